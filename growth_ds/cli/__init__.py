"""`growth-ds`: parses, calls, exits. Every heavy import waits until its verb runs.

Exit codes: 0 done, 2 something the user gave cannot be used (one line on stderr, with a code of
`growth_ds.catalogue`), 75 stopped and saved, else a crash.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer

from growth_ds.catalogue import DENIED, USAGE, code_of
from growth_ds.cli import checkpoints, hosts, runs
from growth_ds.cli.common import app
from growth_ds.errors import GrowthFailed, UserError

USER_ERROR = 2
__all__ = ["app", "checkpoints", "hosts", "main", "runs"]


def main() -> None:
    """The console script."""
    usage_error: Any = typer.BadParameter.__mro__[2]  # ClickException: typer 0.16 and later may bring their own click
    try:
        code = app(standalone_mode=False) or 0
    except UserError as error:
        code = _refuse(f"{error} [{code_of(error)}]", USER_ERROR, everywhere=getattr(error, "on_this_rank", False))
    except GrowthFailed as error:
        code = _refuse(str(error), 1)
    except PermissionError as error:
        if error.filename is None:
            raise
        line = f"{error.filename}: {error.strerror} for user {os.geteuid()}; give that user rights there, or be another"
        code = _refuse(f"{line} [{DENIED}]", USER_ERROR, everywhere=True)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or error.filename is None:
            raise
        line = f"{str(error.filename)[:60]}...: the system takes no name of this length; give a shorter one"
        code = _refuse(f"{line} [{USAGE}]", USER_ERROR, everywhere=True)
    except usage_error as error:
        code = _refuse(f"growth-ds: {error.format_message()} See growth-ds --help. [{USAGE}]", USER_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if "growth_ds.engine.distributed" in sys.modules:
        _leave(code)
    sys.exit(code)


def _refuse(line: str, code: int, everywhere: bool = False) -> int:
    """One line, from one rank; `everywhere`: from each that finds it, as the others may find nothing."""
    from growth_ds.engine.places import first_guess

    if everywhere or first_guess() == "0":
        print(" ".join(line.split()), file=sys.stderr)
    return code


def _leave(code: int) -> None:
    """The end of a rank: say how it ended, and let no launcher's signal turn that into a crash."""
    import signal

    from growth_ds.engine.distributed import shutdown
    from growth_ds.engine.reports import report_exit

    if "RANK" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    report_exit(code)
    shutdown()
