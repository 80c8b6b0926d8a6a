"""The API page covers the rooms that a researcher calls; `make docs` and `make check` build it, without a warning."""

from __future__ import annotations

import ast
import importlib.util

from tests.docs.tutorials import ROOT


def test_its_modules_are_there():
    tree = ast.parse((ROOT / "docs/api.py").read_text(encoding="utf-8"))
    (value,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "MODULES"]
    names = [node.value for node in ast.walk(value) if isinstance(node, ast.Constant)]
    assert {"growth", "axes", "offline", "coordinator", "evaluate", "testing"} <= set(names)
    for name in names:
        assert importlib.util.find_spec(f"growth_ds.{name}"), name
