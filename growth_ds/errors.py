"""The one exception that is meant for the person who typed the command."""


class UserError(Exception):
    """What the user gave cannot be used: one line that names the file and key, what is wrong, and the fix.

    The command line prints the line and exits with 2; it never shows a traceback for it.
    """
