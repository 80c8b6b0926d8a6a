"""Judging a model: masked-LM loss and accuracy with fixed masks, and the unigram baseline."""
