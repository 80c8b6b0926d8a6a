"""Compiles every CUDA kernel for every architecture, and fails where nvcc warns or registers spill to memory.

python csrc/check_cuda.py prints op, kernel, architecture, registers and shared memory: the worst of each kernel's
variants; with the nvcc that the READMEs name, those are compared. No GPU is needed; without nvcc it says so and passes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_ops import CUDA_ARCHITECTURES, NVCC, kernels, nvcc

README_OF = "release 13.0"  # the nvcc whose registers the READMEs give
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


class Variant(NamedTuple):
    """One kernel for one set of template arguments, as ptxas reports it; sizes in bytes a thread and a block."""

    kernel: str
    registers: int
    spilled: int
    shared: int


def name(mangled: str) -> str:
    """The function's own name: the last identifier before the template arguments."""
    parts, rest = [], mangled.removeprefix("_ZN")
    while found := re.match(r"(\d+)", rest):
        length = int(found[1])
        rest = rest[found.end() :]
        parts.append(rest[:length])
        rest = rest[length:]
    return parts[-1] if parts else mangled


def variants(log: str) -> list[Variant]:
    """What `ptxas -v` says of every kernel."""
    found = []
    for part in log.split("Compiling entry function")[1:]:
        mangled = re.search(r"'(\w+)'", part)
        spills, used, shared = SPILLS.search(part), USED.search(part), SHARED.search(part)
        if mangled and spills and used:
            size = int(shared[1]) if shared else 0
            found.append(Variant(name(mangled[1]), int(used[1]), int(spills[1]) + int(spills[2]), size))
    return found


def compile_one(job: tuple[Path, int]) -> str:
    """nvcc's output for one file and architecture; RuntimeError with it if that fails."""
    source, architecture = job
    with tempfile.TemporaryDirectory() as folder:
        flags = [*NVCC, f"-arch=sm_{architecture}", "-Xptxas", "-v", "-Xcompiler", "-Wall"]
        command = [nvcc() or "nvcc", *flags, "-c", str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source}: nvcc fails\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def readme(source: Path, worst: dict[str, list[int]]) -> list[str]:
    """The rows that an op's README should have in its table `| kernel | sm_80 | sm_90 |` of registers, and has not."""
    path = source.parent / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    rows = [f"| {kernel} | {' | '.join(map(str, registers))} |" for kernel, registers in worst.items()]
    return [f"{source.parent.name}/README.md has no row '{row}'" for row in rows if row not in text]


def main() -> int:
    if nvcc() is None:
        print("csrc/check_cuda.py: no nvcc here, the CUDA kernels are not compiled")
        return 0
    jobs = [(source, number) for source in kernels("*_kernel.cu") for number in CUDA_ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(compile_one, jobs))
    wrong: list[str] = []
    registers: dict[Path, dict[str, list[int]]] = {}
    print(f"{'op':34}{'kernel':16}{'sm':>4}{'variants':>10}{'registers':>11}{'shared B':>10}{'spilled B':>11}")
    for (source, number), log in zip(jobs, logs, strict=True):
        wrong += [f"{source.parent.name}, sm_{number}: {line}" for line in log.splitlines() if "warning" in line]
        found = variants(log)
        if not found:
            wrong.append(f"{source.parent.name}, sm_{number}: ptxas reports no kernel")
        for kernel in sorted({variant.kernel for variant in found}):
            mine = [variant for variant in found if variant.kernel == kernel]
            worst = [max(variant[field] for variant in mine) for field in (1, 3, 2)]
            print(
                f"{source.parent.name:34}{kernel:16}{number:>4}{len(mine):>10}{worst[0]:>11}{worst[1]:>10}{worst[2]:>11}"
            )
            registers.setdefault(source, {}).setdefault(kernel, []).append(worst[0])
            spilled = worst[2]
            if spilled:
                wrong.append(f"{source.parent.name}, sm_{number}: {kernel} spills {spilled} bytes of registers")
    version = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    if README_OF in version:
        wrong += [line for source, worst in registers.items() for line in readme(source, worst)]
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
