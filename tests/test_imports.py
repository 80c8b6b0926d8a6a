"""Who may import whom: the rooms of the package, read from the import statements of every file.

A room is a folder or a file right under growth_ds. The order of the table is the order of the storeys: a room may use
only what its row names, and `errors`, `catalogue`, `axes` and `files`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "growth_ds"
BY_ALL = {"errors", "catalogue", "axes", "files", "faults", "growth_ds"}
BASE = {"config", "config_file"}
PARTS = BASE | {"growth", "model", "engine", "optim", "ops"}

ROOMS: dict[str, set[str]] = {
    "growth_ds": set(),
    "errors": set(),
    "catalogue": set(),
    "axes": set(),
    "files": set(),
    "faults": set(),
    "lock": set(),
    "part": set(),
    "image": set(),
    "stragglers": {"engine"},
    "board": {"config"},
    "profiling": {"config"},
    "config": set(),
    "config_file": {"config"},
    "progress": BASE | {"engine"},
    "terminal": set(),
    "rank_logs": {"engine"},
    "host_check": {"engine"},
    "growth": {"config"},  # algebra on tables: it takes the layout as an argument
    "ops": {"config"},
    "data": {"config"},
    "model": {"config", "ops"},
    "optim": {"config", "ops"},
    "engine": {"config", "ops", "optim"},  # it is handed a module
    "paths": {"config"},
    "start": BASE | {"growth", "model", "checkpoint", "data", "during"},
    "planning": BASE | {"growth", "model", "paths", "start", "terminal"},
    "hardware": set(),
    "forecast": BASE | {"hardware", "model", "planning", "progress", "terminal"},
    "policy": BASE | {"model", "planning"},
    "correlation": PARTS | {"data"},
    "importance": PARTS | {"data"},
    "judge": PARTS | {"policy", "correlation", "evaluate"},
    "checkpoint": PARTS,
    "run_folder": BASE | {"checkpoint", "start"},
    "records": {"board", "config", "run_folder"},
    "inspection": PARTS | {"checkpoint"},
    "during": BASE | {"growth", "model"},
    "saving": PARTS | {"checkpoint", "run_folder"},
    "reshard": PARTS | {"checkpoint"},
    "learning": PARTS | {"checkpoint", "data", "planning", "run_folder", "saving"},
    "coordinator": PARTS
    | {"data", "importance", "checkpoint", "during", "learning", "paths", "reshard", "run_folder", "saving", "start"},
    "opening": PARTS | {"board", "data", "image", "planning", "run_folder", "start"},
    "evaluate": PARTS | {"data"},
    "surroundings": BASE | {"data", "engine", "evaluate", "image", "start"},
    "interop": PARTS | {"checkpoint", "data"},
    "report": BASE | {"model", "checkpoint", "run_folder"},
    "folding": {"config", "model"},
    "model_card": BASE | {"model", "report", "run_folder"},
    "doctor": {"image", "ops"},
    "testing": BASE | {"growth", "model"},  # for recipes of users: it may not need an engine
}
ROOMS["trainer"] = set(ROOMS) - {"interop"}
ROOMS["launch"] = ROOMS["trainer"] | {"trainer"}
ROOMS["launching"] = {"config", "config_file", "engine"}
ROOMS["offline"] = ROOMS["trainer"] | {"interop"}
ROOMS["inside"] = {"config", "checkpoint", "data", "evaluate", "model", "offline", "report", "run_folder"}
ROOMS["reporting"] = {"inside", "report", "run_folder"}
ROOMS["folders"] = ROOMS["offline"] | {"offline"}
ROOMS["demo"] = ROOMS["launch"] | {"launch", "offline", "interop", "inside"}
ROOMS["fit"] = ROOMS["trainer"]
ROOMS["calibration"] = {"data", "doctor", "engine"}
ROOMS["calibrating_memory"] = ROOMS["trainer"] | {"calibration", "forecast_here", "trainer"}
ROOMS["calibrating"] = ROOMS["trainer"] | {"calibrating_memory", "calibration", "fit", "trainer"}
ROOMS["forecast_here"] = PARTS | {"calibration", "data", "forecast", "planning"}
ROOMS["reckoning"] = {"config", "calibration", "forecast", "forecast_here", "hardware"}
ROOMS["suite"] = ROOMS["launch"] | {"launch", "fit"}
ROOMS["convert"] = ROOMS["offline"] | {"offline"}
ROOMS["downstream"] = ROOMS["offline"] | {"offline"}
ROOMS["cli"] = set(ROOMS)
ROOMS["__main__"] = {"cli"}

HOMES = {
    # a library -> where alone it may be imported
    "deepspeed": ("engine/",),
    "megatron": ("data/store.py",),
    "apex": ("ops/", "optim/"),
}
WITHOUT = {
    # rooms that must open fast, or be testable alone -> libraries they may not import
    "errors": {"torch", "numpy", "pydantic", "yaml"},
    "axes": {"torch", "numpy", "pydantic", "yaml"},
    "config": {"torch", "numpy"},
    "config_file": {"torch", "numpy"},
    "growth": {"numpy", "transformers", "safetensors"},
    "model": {"numpy", "transformers", "safetensors"},
    "engine": {"transformers"},
    "trainer": {"transformers"},
}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, wherever in it; relative imports start with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from growth_ds import offline` is the room offline; `from growth_ds import __version__` is none
            for alias in node.names if module == "growth_ds" else [None]:
                yield node.lineno, f"{module}.{alias.name}" if alias and alias.name in ROOMS else module


def breaches(path: str, source: str) -> list[str]:
    """What a file of the package (`growth/plan.py`) imports though it must not."""
    room = path.split("/")[0].removesuffix(".py").replace("__init__", "growth_ds")
    if room not in ROOMS:
        return [f"{path}: room '{room}' has no row in tests/test_imports.py; say what it may import"]
    found = []
    for line, name in imported(source):
        library, _, rest = name.partition(".")
        target = rest.split(".")[0] or "growth_ds"
        if name.startswith("."):
            found.append(f"{path}:{line}: relative import; name the module in full")
        elif library == "growth_ds" and target != room and target not in ROOMS[room] | BY_ALL:
            found.append(f"{path}:{line}: {room} must not import {target}")
        elif library in HOMES and not path.startswith(HOMES[library]):
            found.append(f"{path}:{line}: {library} belongs into {' or '.join(HOMES[library])}")
        elif library in WITHOUT.get(room, ()):
            found.append(f"{path}:{line}: {room} must do without {library}")
    return found


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_the_package_is_found():
    assert {"config/run.py", "growth/plan.py", "engine/zero.py", "cli/runs.py"} <= set(FILES)


@pytest.mark.parametrize("path", FILES)
def test_every_file_imports_only_what_it_may(path):
    assert breaches(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


BREACHES = [
    ("growth/plan.py", "from growth_ds.model.layout import layout", "growth must not import model"),
    ("growth/plan.py", "import growth_ds.engine.zero as z", "growth must not import engine"),
    (
        "engine/zero.py",
        "def f():\n    from growth_ds.model.bert import Bert",
        "engine/zero.py:2: engine must not import model",
    ),
    ("engine/zero.py", "from growth_ds import growth", "engine must not import growth"),
    ("optim/groups.py", "if True:\n    import growth_ds.growth.plan", "optim must not import growth"),
    ("config/run.py", "import torch.nn", "config must do without torch"),
    ("model/bert.py", "from growth_ds.config_file import load_run", "model must not import config_file"),
    ("data/text.py", "from growth_ds.model import cost", "data must not import model"),
    ("trainer.py", "import deepspeed", "deepspeed belongs into engine/"),
    ("data/loader.py", "from megatron.core import datasets", "megatron belongs into data/store.py"),
    (
        "model/bert.py",
        "try:\n    import apex\nexcept ImportError:\n    apex = None",
        "apex belongs into ops/ or optim/",
    ),
    ("report/html.py", "from growth_ds import cli", "report must not import cli"),
    ("growth/apply.py", "from .plan import GrowthPlan", "relative import"),
    ("errors.py", "from growth_ds.config import Run", "errors must not import config"),
    ("sorcery.py", "", "room 'sorcery' has no row"),
]


@pytest.mark.parametrize(("path", "source", "message"), BREACHES)
def test_a_breach_is_seen(path, source, message):
    [found] = breaches(path, source)
    assert message in found


ALLOWED = [
    ("engine/zero.py", "import deepspeed"),
    ("optim/lamb.py", "import apex"),
    ("data/store.py", "from megatron.core.datasets import indexed_dataset"),
    ("growth/plan.py", "import torch\nfrom growth_ds.axes import parse\nfrom growth_ds.growth.recipes import tile"),
    ("trainer.py", "from growth_ds import __version__"),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_is_allowed_is_no_breach(path, source):
    assert breaches(path, source) == []
