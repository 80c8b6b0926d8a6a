"""The exceptions that are meant for the person who typed the command."""

from __future__ import annotations

import sys


class UserError(Exception):
    """What the user gave cannot be used: one line that names the file and key, what is wrong, and the fix.

    The command line prints the line, with the error's code at its end, and exits with 2; it never shows a traceback for
    it. The code is given, or that of the error that is being handled, or that of the module that makes this one
    (`growth_ds.catalogue`).
    """

    code: str | None = None

    def __init__(self, line: object = "", code: str | None = None) -> None:
        super().__init__(line)
        self.made_in = str(sys._getframe(1).f_globals.get("__name__", ""))
        inner = sys.exc_info()[1]
        if code is None and isinstance(inner, UserError):  # its line with more of the place, not another error
            ours = inner.made_in.startswith("growth_ds.")  # and not a recipe of the user's
            code, self.made_in = inner.code, inner.made_in if ours else self.made_in
        self.code = code or self.code

    on_all_ranks = False
    """Whether it is known that every rank raises one at this place (`distributed.settle`): they can still agree."""


class Unreadable(UserError):
    """A checkpoint that may be whole: the system does not give its bytes now, or another version wrote it.

    Not to be taken for damage: nothing older is used in its place, and nothing is removed.
    """

    code = "GDS-K02"


class GrowthFailed(Exception):
    """A growth moved the probe loss although it was to be exact, or left it no number. The line says what and how much.

    The checkpoint from before the growth is whole and current. The command line prints the line and exits with 1.
    """


class Stopped(Exception):
    """All ranks have agreed to stop, before a step or in the middle of what can be left: a measurement, a growth.

    Raised on every rank at the same place. Nothing is lost: what was begun is done again by the run that goes on.
    """
