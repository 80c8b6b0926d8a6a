"""`growth-ds report`: the page of one run, or of several beside the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from growth_ds.errors import UserError


def report(runs: Sequence[Path], out: Path | None, layers: bool, force: bool) -> Path:
    """Write the page to `out`, or into the first run's folder, and return where it is. Raises UserError.

    `layers`: also look into the checkpoints that are kept, which loads the models.
    """
    from growth_ds.report.html import write_report
    from growth_ds.run_folder import RunFolder

    first = RunFolder(runs[0])
    out = out or first.report
    check_page(out, force)
    first.run()  # says what is no run before anything is loaded
    others = dict(zip(names(runs)[1:], runs[1:], strict=True))
    found = []
    if layers:
        from growth_ds.inside import look_inside

        found = look_inside(first)
    try:
        return write_report(runs[0], out, others, layers=found)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{runs[0]}: ledger or metrics have a line that no run has written ({what}); remove that line"
        ) from None


def check_page(out: Path, force: bool) -> None:
    """Raises UserError for a folder, and for a file that is not to be replaced."""
    if out.is_dir():
        raise UserError(f"{out}: is a folder; give --out the name of a file")
    if out.exists() and not force:
        raise UserError(f"{out}: exists; give another --out, or --force to replace it", "GDS-O01")


def names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart. Raises UserError for one that stands twice."""
    parts = [path.absolute().parts for path in runs]
    if len(set(parts)) < len(parts):
        twice = next(str(path) for path, each in zip(runs, parts, strict=True) if parts.count(each) > 1)
        raise UserError(f"{twice}: is given twice; give each run once")
    length = 1
    while len({each[-length:] for each in parts}) < len(parts):
        length += 1
    return ["/".join(each[-length:]) for each in parts]
