"""What a wheel and an sdist hold, and that no object in a wheel is tuned to the machine that built it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache")


def build_ops():
    spec = importlib.util.spec_from_file_location("build_ops", ROOT / "csrc/build_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_objects_are_for_any_processor():
    """The base set has no flags of its own; the others are named levels, one of which is chosen at run time."""
    module = build_ops()
    assert module.SETS["base"] == []
    flags = [*module.FLAGS, *module.X86, *(flag for flags in module.SETS.values() for flag in flags)]
    assert not [flag for flag in flags if "native" in flag or flag.startswith("-mtune")]
    levels = [flag for flag in flags if flag.startswith("-march")]
    assert all(re.fullmatch(r"-march=x86-64-v[34]", flag) for flag in levels)


def test_the_extras_are_those_that_are_told():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    for name in ("mpi", "wandb", "mlflow", "datasets", "evaluate", "dev"):
        assert f'    "{name}": [' in text or f'    "{name}": EVALUATE' in text


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tree: building leaves files in it."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("package") / "source", ignore=LEFT_OUT))


@pytest.mark.slow
def test_a_wheel_is_built_without_a_compiler(source, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=source, env={**os.environ, "CC": "false", "CXX": "false"}, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"growth_ds/py.typed", "growth_ds/configs/run/demo.yaml", "growth_ds/growth/recipes/README.md"} <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith(("tests/", "csrc/", "docs/"))]


@pytest.mark.slow
def test_an_sdist_is_complete(source, tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("growth_ds", "csrc", "configs", "docs", "examples"):
        wanted = {p.relative_to(source).as_posix() for p in (source / folder).rglob("*") if p.is_file()}
        assert {name for name in wanted if "__pycache__" not in name} <= held, folder
    assert {"setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "constraints.txt"} <= held
