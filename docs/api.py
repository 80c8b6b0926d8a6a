"""The API page: `make docs` writes build/docs from the docstrings. A warning of pdoc's ends it."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import pdoc

MODULES = (
    *(
        "axes",
        "catalogue",
        "checkpoint",
        "config",
        "config_file",
        "coordinator",
        "data",
        "errors",
        "evaluate",
        "growth",
    ),
    *("interop", "model", "offline", "optim", "planning", "policy", "report", "run_folder", "testing", "trainer"),
)
"""What a researcher calls from Python, of growth_ds; packages with all that is in them."""
OUT = Path(__file__).resolve().parent.parent / "build/docs"


def main() -> None:
    """Write the pages. Raises UserWarning for a name or docstring that pdoc cannot make a page of."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    names = [f"growth_ds.{name}" for name in MODULES]
    for name in names:
        module = importlib.import_module(name)
        for each in getattr(module, "__all__", ()):  # what is imported when it is asked for, pdoc does not ask for
            setattr(module, each, getattr(module, each))
    warnings.simplefilter("error", UserWarning)
    pdoc.render.configure(docformat="markdown", footer_text="growth_ds", search=True)
    pdoc.pdoc(*names, output_directory=OUT)
    print(f"{OUT}/index.html: {len(list(OUT.rglob('*.html')))} pages")


if __name__ == "__main__":
    main()
