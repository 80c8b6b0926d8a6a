"""The typed description of a run: Run > Stage > {Model, Data, Optim, Engine, Grow}.

Everything here is frozen and validated before a byte is allocated; nothing here imports torch. Growth is not written
down anywhere as such: it is the difference of two neighbouring stages (`Stage.model`), and the `grow:` block only says
by which recipe and with which policy. `config_file.py` reads YAML into these classes.
"""

from growth_ds.config.base import Frozen, whole
from growth_ds.config.grow import Grow, Sources
from growth_ds.config.learn import LEARNED, Learn
from growth_ds.config.model import AXES, DEFAULT_VOCAB_SIZE, EXPERT, FACTORS, FFN_RANK, THIN, Model, inherit_model
from growth_ds.config.run import (
    OWNED_BY_US,
    Checkpoint,
    Data,
    Elastic,
    Engine,
    Evaluation,
    Log,
    Run,
    StoreShare,
)
from growth_ds.config.stage import Batch, Optim, Stage
from growth_ds.config.suite import SCRATCH, Corpus, Method, Suite
from growth_ds.config.until import Until

__all__ = [
    "AXES",
    "DEFAULT_VOCAB_SIZE",
    "EXPERT",
    "FACTORS",
    "FFN_RANK",
    "LEARNED",
    "OWNED_BY_US",
    "SCRATCH",
    "THIN",
    "Batch",
    "Checkpoint",
    "Corpus",
    "Data",
    "Elastic",
    "Engine",
    "Evaluation",
    "Frozen",
    "Grow",
    "Learn",
    "Log",
    "Method",
    "Model",
    "Optim",
    "Run",
    "Sources",
    "Stage",
    "StoreShare",
    "Suite",
    "Until",
    "inherit_model",
    "whole",
]
