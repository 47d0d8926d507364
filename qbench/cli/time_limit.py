"""A time limit for a run, on systems with and without SIGALRM."""

import _thread
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qbench.errors import RunTimeout


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise RunTimeout in the body after `seconds`; None sets no limit."""
    if seconds is None:
        yield
        return
    with (_alarm if hasattr(signal, "setitimer") else _interrupt)(seconds):
        yield


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Set the limit with SIGALRM."""

    def stop(*_: object) -> None:
        raise RunTimeout(too_long(seconds))

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _interrupt(seconds: float) -> Iterator[None]:
    """Set the limit on a system without SIGALRM, such as Windows: a timer interrupts the main thread like Ctrl-C."""
    before: Any = signal.getsignal(signal.SIGINT)
    lock, over, expired = threading.Lock(), False, False

    def expire() -> None:
        nonlocal expired
        with lock:
            if not over:
                expired = True
                _thread.interrupt_main()

    def stop(number: int, frame: Any) -> None:
        if expired:
            if not over:
                raise RunTimeout(too_long(seconds))
        elif callable(before):
            before(number, frame)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    signal.signal(signal.SIGINT, stop)
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
        timer.cancel()
        signal.signal(signal.SIGINT, before)


def too_long(seconds: float) -> str:
    """The message of a run that took too long."""
    return f"the run took longer than timeout={seconds} s"
