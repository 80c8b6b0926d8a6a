"""Progressive-growth pre-training of BERT on DeepSpeed: start small, grow while training."""

__version__ = "0.5.0"
