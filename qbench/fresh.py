"""A function in a process of its own, forked from this one, with all that this one has in memory.

Its peak of memory is then its own, whatever ran before; and what ends it, such as a system that is out of memory, ends
nothing else.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

import torch


def possible() -> bool:
    """Whether a child could work: on Linux, where this process has used neither CUDA nor numba's threads."""
    numba_threads = sys.modules.get("numba.np.ufunc.parallel")
    used = torch.cuda.is_initialized() or getattr(numba_threads, "_is_initialized", False)
    return sys.platform == "linux" and hasattr(os, "fork") and not used


def call(function: Callable[[], int]) -> int:
    """What `function` returns, 0 to 255, in a child; where a signal ended that, minus its number.

    An interrupt is handed on to the child, and raised here once that has ended. Raises OSError where no process can start.
    """
    children: list[int] = []
    statuses: list[int] = []
    ended = threading.Event()

    def start_and_wait() -> None:
        try:
            children.append(os.fork())
            if not children[0]:
                _child(function)
            statuses.append(os.waitpid(children[0], 0)[1])
        finally:
            ended.set()

    # GNU OpenMP keeps its threads by the thread that called it: a child of a new one starts its own
    threading.Thread(target=start_and_wait).start()
    interrupt = None
    while not ended.is_set():
        try:
            ended.wait()
        except KeyboardInterrupt as raised:
            interrupt = raised
            if children and not statuses:
                os.kill(children[0], signal.SIGINT)
    if interrupt:
        raise interrupt
    if not statuses:
        raise OSError("the system starts no further process")
    return os.waitstatus_to_exitcode(statuses[0])


def _child(function: Callable[[], int]) -> None:
    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one, of the same Ctrl-C, has nothing to add
        raise KeyboardInterrupt

    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive its parent
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for what a shell runs in the background
            signal.signal(signal.SIGINT, interrupt)
        code = function()
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
