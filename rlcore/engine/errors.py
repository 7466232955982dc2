"""What went wrong, in one sentence: the command line prints these without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something in the command, the config or the files is not as it must be; the message says what. Exit code 2."""


class SaveError(Exception):
    """The machine could not write (disk full, read-only directory); what was saved before is intact. Exit code 3."""


class Interrupted(Exception):
    """Stopped by Ctrl-C or a termination signal; the message says what is saved and how to go on. Exit code 130."""
