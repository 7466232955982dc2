"""Ctrl-C while the command `rlcore` is still importing torch: one sentence and exit code 130, like later on.

The package is imported before any line of the command, so it is the package that has to see to it, and only where the
process is that command: a program that imports rlcore gets its KeyboardInterrupt.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType


def is_command() -> bool:
    """Whether this process is `rlcore` or `python -m rlcore.cli`, whose argv[0] is -m until its packages are there."""
    name = "".join(sys.argv[:1])  # a program that embeds Python may have none
    return Path(name).stem == "rlcore" or name == "-m" and "rlcore.cli" in sys.orig_argv


def leave(number: int, frame: FrameType | None) -> None:
    """Ends the process at once: an exception in the middle of an import may come out as another one, or not at all."""
    os.write(2, b"rlcore: interrupted\n")
    os._exit(130)


def begin() -> None:
    """Takes Ctrl-C over, unless someone else has it or it is ignored, as in a shell's background job."""
    if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def end() -> None:
    """Gives Ctrl-C back: from here on it is an exception that the command handles."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


begin()
