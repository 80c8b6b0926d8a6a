"""DeepSpeed's one compiled CPU op (`deepspeed_shm_comm`), built once and without the ways it can go wrong.

On a CPU `deepspeed.init_distributed` compiles a shared-memory collective with torch's extension builder: 30 s of
silence at the first start, a hard failure without a C++ compiler, and after a killed compile a file named `lock` on
which every later run waits for ever (torch/utils/file_baton.py has no time limit).

Here the build and every load happen under an `fcntl.flock`, which the kernel releases when its owner dies. Whoever
holds it knows that a `lock` file left in the folder belongs to nobody, and removes it. Without a compiler the op is
left out: DeepSpeed uses it for `inference_all_reduce` only, training goes through gloo either way.

    python -m growth_ds.engine.build_ops        builds it now (images, clusters with a shared home)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OP = "deepspeed_shm_comm"
READY = "built_by_growth_ds"
"""Empty file beside the library: it was built to the end, and loaded once."""


def extensions_dir() -> Path:
    """Where torch builds extensions for us: TORCH_EXTENSIONS_DIR if set, else a cache folder per environment.

    The compiler's command names the folder of the torch that is used: two environments of the same versions in one
    cache would build in turns, each finding what the other built out of date.
    """
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    torch_version, ds_version = (importlib.metadata.version(name) for name in ("torch", "deepspeed"))
    place = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    name = f"{torch_version}-{ds_version}-{sys.implementation.cache_tag}-{place}"
    return cache / "growth_ds" / "torch_extensions" / name


@contextlib.contextmanager
def build_lock(root: Path) -> Iterator[None]:
    """Exclusive use of `root` among growth_ds processes; stale torch locks of the op are removed on entry."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".growth_ds.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        baton = root / OP / "lock"
        if baton.exists() and not _held(baton):
            baton.unlink(missing_ok=True)
        yield


def _held(path: Path) -> bool:
    """True when a process of this machine has `path` open: torch's builder keeps its lock file open.

    It matters only in a folder that other programs share through TORCH_EXTENSIONS_DIR; ours is behind the flock.
    """
    want = path.stat()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            have = link.stat()
            if (have.st_ino, have.st_dev) == (want.st_ino, want.st_dev):
                return True
    return False


def missing_tools() -> list[str]:
    """What the build needs and this machine lacks."""
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX") or "c++"
    missing = [] if shutil.which(compiler) else [f"C++ compiler ({compiler})"]
    return missing + ([] if cpp_extension.is_ninja_available() else ["ninja"])


def _build(root: Path) -> Any:
    """Compile and load. The mark comes last: a file that a killed linker left behind has none."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    op = None if builder is None else builder.load(verbose=False)
    if op is not None:
        (root / OP / READY).touch()
    return op


def _library(root: Path) -> Any:
    """Load what was compiled before. torch's loader would ask ninja at every start, which compiles again whenever its
    log was hurt by a kill; the name of the folder says for what this was built."""
    spec = importlib.util.spec_from_file_location(OP, root / OP / f"{OP}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load(root: Path) -> tuple[Any, str]:
    """(op, "") or (None, the reason it is left out). Compiles once."""
    with build_lock(root):
        missing = [] if _built(root) else missing_tools()
        if missing:
            return None, f"no {' and no '.join(missing)}"
        try:
            return (_library(root) if _built(root) else _build(root)), ""
        except (RuntimeError, OSError, ImportError) as error:
            return None, (str(error).strip() or type(error).__name__).splitlines()[0]


def _built(root: Path) -> bool:
    return (root / OP / READY).exists() and (root / OP / f"{OP}.so").exists()


def ensure_ops(quiet: bool = False) -> bool:
    """Make the op ready for `deepspeed.init_distributed`; True when it is there, False when it is left out.

    Sets TORCH_EXTENSIONS_DIR. Prints one line when it has to compile, unless `quiet`; warns once when it cannot.
    """
    import torch

    if torch.cuda.is_available() or sys.platform != "linux":
        return False  # GPU backends never ask for it
    root = extensions_dir()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
    # Before the lock: another process may be the one that builds, and then waiting for it is what takes the time.
    if not quiet and not _built(root) and not missing_tools():
        print("building DeepSpeed's CPU communication op (once, about 30 s)", flush=True)
    op, reason = _load(root)
    if reason and not quiet:
        warnings.warn(f"DeepSpeed's CPU communication op is left out ({reason}); gloo does the work", stacklevel=2)
    _replace_loader(op)
    return op is not None


def _replace_loader(op: Any) -> None:
    """Hand DeepSpeed's backend the op that is already loaded: its own loader would go to torch's lock file again."""
    # By its full name: the attribute `torch` of the package deepspeed.comm is PyTorch, not this module.
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: op  # type: ignore[attr-defined]


def main() -> int:
    """Build now and say where. Never a failure: a GPU does not ask for the op, gloo does its work."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from growth_ds.engine.distributed import quiet_deepspeed

    quiet_deepspeed()
    ready = ensure_ops()
    print(f"{OP}: {'ready in ' + str(extensions_dir()) if ready else 'not built, and not needed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
