"""Our engine options as DeepSpeed's JSON, and the refusals that keep the guard layer's promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from growth_ds.errors import UserError

PRECISIONS = ("fp32", "bf16", "fp16")

# Keys that ZeroEngine decides: a second opinion in the raw JSON would silently win or lose.
_OWNED = {
    "train_batch_size": "the batch sizes of the stage",
    "train_micro_batch_size_per_gpu": "the batch sizes of the stage",
    "gradient_accumulation_steps": "the batch sizes of the stage",
    "gradient_clipping": "the optimizer's clip",
    "optimizer": "the optimizer of the run",
    "scheduler": "the learning-rate schedule of the run",
    "zero_optimization": "the engine's zero options",
    "amp": "the engine's precision",
    "torch_autocast": "the engine's precision",
    "data_types.grad_accum_dtype": "growth_ds, which always accumulates gradients in fp32",
    "bf16.enabled": "the engine's precision",
    "fp16.enabled": "the engine's precision",
}

# Our defaults for a ZeRO section. DeepSpeed's buckets are 5e8 elements: 2 GB of fp32 each, most of it never used by
# a model of BERT's size. 5e7 is one bucket for four BERT-Large layers.
_ZERO_DEFAULTS = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}


def supports_bf16() -> bool:
    """True where bf16 arithmetic is fast: a GPU that has it, or a CPU with AVX512-BF16 or AMX."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(name: str) -> str:
    """One of fp32, bf16, fp16 for `name`, which may be "auto" (bf16 where it is fast, else fp32).

    Raises UserError for an unknown name and for fp16 without a GPU. Local: when ranks run on unlike machines, let
    rank 0 decide and broadcast.
    """
    import torch

    if name == "auto":
        return "bf16" if supports_bf16() else "fp32"
    if name not in PRECISIONS:
        raise UserError(f"engine.precision: {name!r} is unknown; use auto, {', '.join(PRECISIONS)}")
    if name == "fp16" and not torch.cuda.is_available():
        raise UserError("engine.precision: fp16 needs a GPU; on a CPU use bf16 or fp32")
    return name


def zero_section(zero: dict[str, Any]) -> dict[str, Any]:
    """The `zero_optimization` section for our options: `zero` itself or a whole JSON that holds one.

    Raises UserError for a stage other than 0..3 and for features whose state growth cannot read or write.
    """
    section = dict(zero.get("zero_optimization", zero))
    stage = section.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"engine.zero.stage: {stage!r} is not a ZeRO stage; use 0, 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if (section.get(key) or {}).get("device") == "nvme":
            raise UserError(f"engine.zero.{key}: nvme keeps the state on disk, where growth cannot move it; use cpu")
    if section.get("zero_hpz_partition_size", 1) > 1:
        raise UserError("engine.zero.zero_hpz_partition_size: its second copy of the weights cannot grow; remove it")
    # Quantised weights cannot be written exactly; the others keep state in places or orders of their own.
    for key in ("zero_quantized_weights", "zenflow", "mics_shard_size", "round_robin_gradients"):
        if section.get(key):
            raise UserError(f"engine.zero.{key}: its state cannot be read and written exactly; remove it")
    if stage == 0:
        return {"stage": 0}
    return {**_ZERO_DEFAULTS, **section, "stage": stage}


def build(
    zero: dict[str, Any], precision: str, micro_batch: int, accumulation: int, clip: float, extra: dict[str, Any]
) -> dict[str, Any]:
    """The whole DeepSpeed configuration; UserError names a key of `extra` that contradicts ours."""
    _refuse_owned(extra)
    section = zero_section(zero)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # ZeRO-0 in fp32 is clipped by ZeroEngine, which has to know the norm: DeepSpeed does not tell it there.
        "gradient_clipping": 0.0 if section["stage"] == 0 and precision == "fp32" else clip,
        "zero_optimization": section,
        # Our AdamW gets onto DeepSpeed's list; with CPU offload DeepSpeed would otherwise insist on compiling its own.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    # DeepSpeed's default is to reduce in the model's dtype. bf16 sums lose bits with every rank that is added, and
    # then the loss path depends on the number of ranks; fp32 costs twice the bytes of one gradient exchange a step.
    # A user short of network may say "communication_data_type": "bf16" in the raw JSON.
    config["communication_data_type"] = "fp32"
    if precision == "bf16":
        # Without check_grad_overflow ZeRO-2 applies NaN gradients in bf16 (stage_1_and_2.py, step).
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif precision == "fp16":
        config["fp16"] = {"enabled": True}
    # Stage 0 in 16 bits: DeepSpeed refuses any accumulation dtype but the model's ("unsupported mix", engine.py,
    # _do_optimizer_sanity_check); ZeroEngine makes torch accumulate in fp32 instead (Parameter.grad_dtype).
    if not (section["stage"] == 0 and precision != "fp32"):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(config, extra)


def _refuse_owned(extra: dict[str, Any]) -> None:
    for key, owner in _OWNED.items():
        node: Any = extra
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            raise UserError(f"engine.deepspeed.{key}: set by {owner}; remove it from the DeepSpeed options")


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out
