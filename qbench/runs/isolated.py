"""A function in a process of its own, forked from this one, with all that this one has in memory.

Its peak of memory is then its own, whatever ran before; and what ends it, such as a system that is out of memory, ends
nothing else.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch


def possible() -> bool:
    """Whether a child could work: on Linux, where this process has used neither CUDA nor numba's threads."""
    numba_threads = sys.modules.get("numba.np.ufunc.parallel")
    used = torch.cuda.is_initialized() or getattr(numba_threads, "_is_initialized", False)
    return sys.platform == "linux" and hasattr(os, "fork") and not used


def call(function: Callable[[], int], limit: float | None = None) -> int:
    """What `function` returns, 0 to 255, in a child; where a signal ended that, minus its number.

    limit: seconds after which the child is killed, whatever it is at. An interrupt is handed on to the child, and raised
    here once that has ended. Raises TimeoutError where the limit ended it, OSError where no process can start.
    """
    children: list[int] = []
    statuses: list[int] = []
    begun, ended = threading.Lock(), threading.Event()
    parent = os.getpid()

    def start_and_wait() -> None:
        if not begun.acquire(blocking=False):
            return
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # in the child, until it can handle one
            children.append(os.fork())
            if not children[0]:
                _child(function, parent)
            statuses.append(os.waitpid(children[0], 0)[1])
        finally:
            ended.set()

    deadline = None if limit is None else time.monotonic() + limit
    interrupt, handed_on, late = None, False, False
    while not ended.is_set():
        try:
            if not begun.locked():  # a thread whose start is interrupted may have begun or not
                # GNU OpenMP keeps its threads by the thread that called it: a child of a new one starts its own
                threading.Thread(target=start_and_wait).start()
            if interrupt and children and not handed_on:
                handed_on = True
                _signal(children, statuses, signal.SIGINT)
            if interrupt and not handed_on:
                ended.wait(0.05)
            elif late or deadline is None:
                ended.wait()
            elif not ended.wait(max(0, deadline - time.monotonic())) and children:
                late = True
                _signal(children, statuses, signal.SIGKILL)
        except KeyboardInterrupt as raised:
            interrupt = raised
    if interrupt:
        raise interrupt
    if not statuses:
        raise OSError("the system starts no further process")
    code = os.waitstatus_to_exitcode(statuses[0])
    if late and code == -signal.SIGKILL:
        raise TimeoutError(f"the process took longer than {limit} s")
    return code


def _signal(children: list[int], statuses: list[int], number: int) -> None:
    if not statuses:
        os.kill(children[0], number)


def _child(function: Callable[[], int], parent: int) -> None:
    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one, of the same Ctrl-C, has nothing to add
        raise KeyboardInterrupt

    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive its parent
        if os.getppid() != parent:  # which had gone before
            os._exit(code)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for what a shell runs in the background
            signal.signal(signal.SIGINT, interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        code = function()
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
