"""What went wrong, in one sentence: the command line prints these without a traceback."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def told(error: BaseException) -> str:
    """An exception in one line: its type and message; of a ValueError the message speaks for itself."""
    name, line = type(error).__name__, first_line(error)
    return line if type(error) is ValueError or line == name else f"{name}: {line}"


class UserError(Exception):
    """Something in the command, the config or the files is not as it must be; the message says what. Exit code 2."""


class SaveError(Exception):
    """The machine could not write (disk full, read-only directory); what was saved before is intact. Exit code 3."""


class Interrupted(Exception):
    """Stopped by Ctrl-C or a termination signal; the message says what is saved and how to go on. Exit code 130."""
