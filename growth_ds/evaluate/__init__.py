"""Judging a model: masked-LM loss with fixed masks, the unigram baseline, fine-tuning on downstream tasks."""
