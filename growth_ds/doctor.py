"""`growth-ds doctor`: versions, devices, and which implementation every op takes here, with the reason."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from growth_ds.image import image

PACKAGES = ("torch", "deepspeed", "transformers", "megatron-core", "sentencepiece", "apex")
ABSENT = "absent"


def examine() -> dict[str, Any]:
    """Everything that doctor says, as JSON has it."""
    return {"versions": versions(), "machine": machine(), "ops": ops(), "image": image()}


def versions() -> dict[str, str]:
    """Version of each package that matters, of Python and of nvcc; "absent" where there is none."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}, "nvcc": _nvcc()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    command = (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")
    if command is None:
        return ABSENT
    try:
        said = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}"
    found = re.search(r"\bV([\d.]+)", said)
    return found[1] if found else "unknown"


def machine() -> dict[str, Any]:
    """Processor, threads, memory in GiB, instruction set of the CPU kernels, and the CUDA devices."""
    import psutil
    import torch

    from growth_ds.ops import table

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        memory = round(facts.total_memory / 2**30, 1)
        devices.append({"name": facts.name, "sm": f"{facts.major}{facts.minor}", "memory_gib": memory})
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "instruction_set": table.instruction_set(),
        "torch_cuda": torch.version.cuda or ABSENT,
        "cuda": devices,
    }


def cores() -> int:
    """The number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Name of the processor, as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def ops() -> list[dict[str, str]]:
    """One record for each op and device: what it takes and why."""
    from growth_ds.ops import table

    found = []
    for op in table.OPS:
        for device in table.devices():
            taken, why = table.implementation(op, device)
            found.append({"op": op.name, "device": device, "takes": taken, "why": why, "does": op.does})
    return found


def lines(record: dict[str, Any]) -> list[str]:
    """The record for people."""
    facts = record["machine"]
    out = [f"{name:16}{version}" for name, version in record["versions"].items()]
    out += [
        "",
        f"{facts['system']}, {facts['cores']} cores, {facts['threads']} threads, {facts['memory_gib']} GiB; "
        f"CPU kernels: {facts['instruction_set']}",
    ]
    for index, device in enumerate(facts["cuda"]):
        out.append(f"cuda:{index} {device['name']}, sm_{device['sm']}, {device['memory_gib']} GiB")
    if not facts["cuda"]:
        out.append(f"no CUDA device (torch is built for CUDA: {facts['torch_cuda']})")
    if facts := record.get("image"):
        out.append("image: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = [("op", "device", "takes", "why"), *((r["op"], r["device"], r["takes"], r["why"]) for r in record["ops"])]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    out.append("")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        out.append("  ".join([*cells, row[3]]))
    return out
