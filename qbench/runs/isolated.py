"""Call a function in a child process. It is forked from this process, so it has everything that is in memory here.

The child has its own memory peak. If the child is killed, for example because memory runs out, this process goes on.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch


def possible() -> bool:
    """Whether a child would work: on Linux, if this process has used neither CUDA nor numba's threads."""
    numba_threads = sys.modules.get("numba.np.ufunc.parallel")
    used = torch.cuda.is_initialized() or getattr(numba_threads, "_is_initialized", False)
    return sys.platform == "linux" and hasattr(os, "fork") and not used


def call(function: Callable[[], int], limit: float | None = None) -> int:
    """Call `function` in a child process. Returns its result, 0 to 255, or minus the signal that ended the child.

    limit: seconds after which the child is killed. Ctrl-C is passed on to the child, and raised here once the child has
    ended. Raises TimeoutError if the child was killed at the limit, and OSError if no process can start.
    """
    children: list[int] = []
    statuses: list[int] = []
    begun, ended = threading.Lock(), threading.Event()
    parent = os.getpid()

    def start_and_wait() -> None:
        if not begun.acquire(blocking=False):
            return
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the child unblocks it once it can handle it
            children.append(os.fork())
            if not children[0]:
                _child(function, parent)
            statuses.append(os.waitpid(children[0], 0)[1])
        finally:
            ended.set()

    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader of a pipe may be gone
            stream.flush()  # else the child inherits what is buffered, and writes it a second time
    deadline = None if limit is None else time.monotonic() + limit
    interrupt, passed_on, late = None, False, False
    while not ended.is_set():
        try:
            if not begun.locked():  # a thread whose start was interrupted may or may not have begun
                # GNU OpenMP has a pool of threads per calling thread, so a child of a new thread starts its own pool
                threading.Thread(target=start_and_wait).start()
            if interrupt and children and not passed_on:
                passed_on = True
                _signal(children, statuses, signal.SIGINT)
            if interrupt and not passed_on:
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
        raise OSError("the system cannot start another process")
    code = os.waitstatus_to_exitcode(statuses[0])
    if late and code == -signal.SIGKILL:
        raise TimeoutError(f"the process took longer than {limit} s")
    return code


def _signal(children: list[int], statuses: list[int], number: int) -> None:
    """Send a signal to the child unless it has ended."""
    if not statuses:
        os.kill(children[0], number)


def _child(function: Callable[[], int], parent: int) -> None:
    """Call `function` in the child, and exit with its result. parent: process id of the parent."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ignore a second signal of the same Ctrl-C
        raise KeyboardInterrupt

    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the child dies with its parent
        if os.getppid() != parent:  # the parent died before that call
            os._exit(code)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell ignores it for background jobs
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
