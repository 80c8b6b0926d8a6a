"""The compiled op: a lock that a killed build left behind, no compiler, a busy builder. Built once, then copied."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from growth_ds.engine import build_ops
from growth_ds.engine.build_ops import OP
from tests.engine.distributed_cases import ROOT

START = "from growth_ds.engine import distributed as d; d.init_distributed(60); d.shutdown(); print('STARTED')"


def _start(root: Path, code: str = START, **changes: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(root), **changes}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def built():
    """The folder of the built op; builds it when this machine has none yet."""
    source = build_ops.extensions_dir()
    if not (source / OP / f"{OP}.so").exists():
        subprocess.run([sys.executable, "-m", "growth_ds.engine.build_ops"], cwd=ROOT, check=True, timeout=300)
    return source / OP


@pytest.fixture
def root(tmp_path, built):
    # With its times: ninja would otherwise find everything out of date and compile for half a minute.
    shutil.copytree(built, tmp_path / OP, copy_function=shutil.copy2)
    return tmp_path


def test_stale_lock_does_not_hang(root):
    (root / OP / "lock").touch()
    run = _start(root)
    assert (run.stdout, run.returncode) == ("STARTED\n", 0), run.stdout + run.stderr
    assert not (root / OP / "lock").exists()


def test_a_lock_in_use_is_left_alone(root):
    baton = root / OP / "lock"
    with open(baton, "w"), build_ops.build_lock(root):
        assert baton.exists()
    with build_ops.build_lock(root):
        assert not baton.exists()


def test_build_lock_excludes_and_dies_with_its_owner(tmp_path):
    code = "import sys,time\nfrom pathlib import Path\nfrom growth_ds.engine.build_ops import build_lock\n"
    code += "with build_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    import fcntl

    with open(tmp_path / ".growth_ds.lock", "w") as handle:
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder.kill()
        holder.communicate()
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_without_a_compiler_it_starts_with_one_warning(tmp_path):
    run = _start(tmp_path, CXX="no-such-compiler")
    assert (run.stdout, run.returncode) == ("STARTED\n", 0), run.stdout + run.stderr
    assert run.stderr.count("UserWarning") == 1
    assert "no a C++ compiler" not in run.stderr
    assert "left out (no C++ compiler (no-such-compiler)); gloo does the work" in run.stderr


def test_folder_has_the_versions_unless_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/somewhere")
    assert build_ops.extensions_dir() == Path("/somewhere")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = build_ops.extensions_dir()
    assert folder.parent == tmp_path / "growth_ds" / "torch_extensions"
    assert sys.implementation.cache_tag in folder.name
