"""A time limit on Python code in the main thread."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeUp(BaseException):
    """The time is over. Not an Exception: an `except Exception` inside does not swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUp in the block after so many seconds, and again every second, should something swallow it.

    Limits nest. Code that stays in C without looking for signals is not interrupted; outside the main thread, and where
    the system has no interval timers, there is no limit.
    """
    if (
        seconds == math.inf
        or threading.current_thread() is not threading.main_thread()
        or not hasattr(signal, "setitimer")
    ):
        yield
        return

    def receive(number: int, frame: FrameType | None) -> None:
        raise TimeUp

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, receive)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            # The timer around goes on; if it ran out meanwhile, it fires at once.
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - start)), interval)
