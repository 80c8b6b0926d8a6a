"""What all verbs share: the application, and options that several of them have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="growth-ds",
    help="Progressive-growth pre-training of BERT on DeepSpeed: start small, grow while training.",
    epilog="Exit codes: 0 done, 1 a growth or a check failed, 2 something given cannot be used (one line says what, "
    "with a code for `growth-ds doctor --explain`), 75 stopped and saved: the same command goes on.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
Config = Annotated[Path, typer.Argument(help="A run's YAML file, for example configs/run/demo.yaml.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the YAML: stages.0.steps=10. May be repeated.")
]
Ranks = Annotated[int, typer.Option("--ranks", min=1, help="Processes (ranks) on this machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out already.")]
CheckpointPath = Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder (its newest whole one).")]


@app.callback()
def root(local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0) -> None:
    """Launchers put --local_rank before the verb; the environment says the same."""
