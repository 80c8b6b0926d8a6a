"""Text in, batches out: corpus -> tokenizer -> store -> token stream -> masked batches.

Everything after the store is a pure function of (seed, token offset): nothing depends on a stateful generator, so
ranks, micro-batches, restarts and a change of sequence length never change what the model is shown.
"""
