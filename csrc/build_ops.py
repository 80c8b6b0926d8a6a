"""How setup.py builds the fused ops: for the CPU where there is a compiler, for CUDA where nvcc and a CUDA torch are.

An op is a folder of csrc (its README says what each file is for). Nothing here may stop an installation: without a
compiler, or without a torch to build against, the package runs on the references, and `growth-ds doctor` says why.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent
FLAGS = ["-O3", "-std=c++17", "-Wall", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-g0"]
X86 = ["-DGROWTH_DS_X86", "-Wno-psabi"]
SETS = {"base": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
SETS["v5"] = [*SETS["v4"], "-mavx512bf16"]  # GCC 10, clang 9
STABLE = (
    "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10: one build for it and all later ones
)
CUDA_ARCHITECTURES = (80, 90)
NVCC = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]


def kernels(pattern: str) -> list[Path]:
    """The source files csrc/<op>/<pattern>, in order."""
    return sorted(CSRC.glob(f"*/{pattern}"))


def bindings() -> list[Path]:
    """csrc/<op>/<op>.cpp: what an op is called, and its CPU implementation."""
    return [path for path in kernels("*.cpp") if path.stem == path.parent.name]


def nvcc() -> str | None:
    """The CUDA compiler: $CUDA_HOME/bin/nvcc, or the one on the path."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    return found or shutil.which("nvcc")


def nvcc_architectures() -> list[str]:
    """Machine code for each architecture, and the newest one's PTX for those to come."""
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in CUDA_ARCHITECTURES]
    newest = CUDA_ARCHITECTURES[-1]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def extensions() -> list[Extension]:
    """`_cpu`, and `_cuda` where it can be built; the command below knows how."""
    found = [Extension("growth_ds.ops._cpu", [str(path) for path in bindings()])]
    if nvcc() and kernels("*_kernel.cu") and _torch_has_cuda():
        found.append(Extension("growth_ds.ops._cuda", [str(path) for path in kernels("*_cuda.cpp")]))
    return found


def _torch() -> Path | None:
    """The folder of the torch to build against, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def _torch_has_cuda() -> bool:
    folder = _torch()
    return folder is not None and bool(list((folder / "lib").glob("libtorch_cuda*")))


class BuildOps(build_ext):
    """Builds both, and lets the installation go on when it cannot."""

    def build_extension(self, ext: Extension) -> None:
        folder = _torch()
        if folder is None:
            self.warn(f"{ext.name}: not built, there is no torch here; install torch, then with --no-build-isolation")
            return
        try:
            objects = self._cuda_objects() if ext.name.endswith("_cuda") else self._cpu_objects()
            objects += self._compile(ext.sources, "bindings", [STABLE, *self._includes(folder)])
            self._link(ext, objects, folder)
        except Exception as error:  # distutils has a dozen kinds; none may stop the installation
            self.warn(f"{ext.name}: not built, the package runs without it ({error})")

    def _compile(self, sources: list[str], name: str, flags: list[str]) -> list[str]:
        machine = X86 if platform.machine() in ("x86_64", "AMD64") else []
        # distutils names an object after its source's path from here; csrc stands above every one of them.
        relative = [os.path.relpath(source) for source in sources]
        return self.compiler.compile(
            relative, output_dir=f"{self.build_temp}/{name}", extra_postargs=["-fPIC", *FLAGS, *machine, *flags]
        )

    def _cpu_objects(self) -> list[str]:
        sources = [str(path) for path in kernels("*_cpu.cpp")]
        sets = SETS if platform.machine() in ("x86_64", "AMD64") else {"base": []}
        objects: list[str] = []
        for name, flags in sets.items():
            objects += self._compile(sources, name, [f"-DGROWTH_DS_ISA={name}", *flags])
        return objects

    def _cuda_objects(self) -> list[str]:
        compiler, objects = nvcc(), []
        for source in kernels("*_kernel.cu"):
            target = Path(self.build_temp) / "cuda" / (source.stem + ".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([compiler, *NVCC, *nvcc_architectures(), "-c", source, "-o", target], check=True)
            objects.append(str(target))
        return objects

    def _includes(self, folder: Path) -> list[str]:
        paths = [folder / "include", folder / "include/torch/csrc/api/include"]
        cuda = Path(nvcc() or "/").resolve().parent.parent / "include"
        return [f"-I{path}" for path in [*paths, *([cuda] if cuda.is_dir() else [])]]

    def _link(self, ext: Extension, objects: list[str], folder: Path) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = ["torch", "torch_cpu", "c10"]
        directories = [str(folder / "lib")]
        if ext.name.endswith("_cuda"):
            libraries += ["torch_cuda", "cudart"]
            directories.append(str(Path(nvcc() or "/").resolve().parent.parent / "lib64"))
        self.compiler.link_shared_object(objects, str(target), libraries=libraries, library_dirs=directories)
