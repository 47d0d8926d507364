"""A function in a forked process: its exit code, its end by a signal, an interrupt, and threads of its own."""

import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest


def script(body: str, *, code: int = 0) -> str:
    """Run Python in a process that has used nothing yet; returns what it printed."""
    source = "import os, signal, sys, time, torch\nfrom qbench.runs import isolated\n" + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux")


def test_the_code_of_the_child_comes_back():
    said = script(
        "print(isolated.call(lambda: 0), isolated.call(lambda: 7), isolated.call(lambda: 1 / 0), isolated.call(sys.exit))"
    )
    assert said.split() == ["0", "7", "1", "1"]


def test_a_signal_that_ends_the_child_is_told():
    said = script("print(isolated.call(lambda: os.kill(os.getpid(), signal.SIGKILL)), isolated.call(os.abort))")
    assert [int(word) for word in said.split()] == [-signal.SIGKILL, -signal.SIGABRT]


def test_an_interrupt_reaches_the_child_once_and_then_the_parent():
    said = script("""
        def work():
            try:
                print("at work", flush=True)
                os.killpg(0, signal.SIGINT)  # as a terminal does, to both
                time.sleep(60)
            except KeyboardInterrupt:
                time.sleep(0.3)  # a second signal must not cut the tidying short
                print("tidied up")
                raise
        os.setpgrp()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test may run where it is ignored
        try:
            isolated.call(work)
        except KeyboardInterrupt:
            print("raised")
    """)
    assert said.split("\n")[:3] == ["at work", "tidied up", "raised"]


@pytest.mark.parametrize("first", [True, False])
def test_an_interrupt_as_the_child_starts_reaches_it(first):
    said = script(f"""
        import threading
        def work():
            try:
                time.sleep(60)
            finally:
                print("tidied up")
        start, first = threading.Thread.start, [{first}]
        def interrupted(thread):
            if first:
                first.pop() and start(thread)
                raise KeyboardInterrupt
            start(thread)
        threading.Thread.start = interrupted
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            isolated.call(work)
        except KeyboardInterrupt:
            print("raised")
    """)
    assert said in ("tidied up\nraised\n", "raised\n")  # it may not have begun to work


def test_the_child_does_not_outlive_its_parent():
    said = script(
        """
        def work():
            print(os.getpid(), flush=True)
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        isolated.call(work)
        """,
        code=-signal.SIGKILL,
    )
    child = psutil.Process(int(said)) if psutil.pid_exists(int(said)) else None
    for _ in range(400):
        if child is None or not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


def test_a_child_whose_parent_has_gone_before_it_could_ask_to_go_too_does_nothing():
    """Between the fork and the request to be killed with the parent."""
    said = script(
        """
        import ctypes
        library, parent = ctypes.CDLL, os.getpid()
        def late(name):
            os.kill(parent, signal.SIGKILL)
            while os.getppid() == parent:
                time.sleep(0.01)
            return library(name)
        def work():
            print("at work", flush=True)
        ctypes.CDLL = late
        isolated.call(work)
        """,
        code=-signal.SIGKILL,
    )
    assert said == ""


def test_a_limit_reaches_native_code():
    """To which no signal of Python's gets through."""
    said = script("""
        import ctypes
        def native():
            signal.signal(signal.SIGALRM, lambda *_: sys.exit(3))  # which waits until the library returns
            signal.alarm(1)
            mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
            for _ in range(2):  # the second time it waits for the first
                library.pthread_mutex_lock(mutex)
        started = time.monotonic()
        try:
            isolated.call(native, 2)
        except TimeoutError as error:
            print(error, time.monotonic() - started < 20)
        print(isolated.call(lambda: 4, 60))
    """)
    assert said.split("\n")[:2] == ["the process took longer than 2 s True", "4"]


@pytest.mark.thorough
def test_a_child_computes_with_all_threads_after_its_parent_did():
    """Where the parent has used PyTorch's threads, as long as numba's were not started."""
    script("""
        def work():
            import formats, qbench.model.selection
            w = torch.ones(1024, 1024)
            packed = formats.get("nf4").quantize(w)
            return int(not torch.equal(packed.dequantize() @ w, w @ w))
        torch.set_num_threads(2)
        (torch.ones(2000, 2000) @ torch.ones(2000, 2000)).exp()
        assert isolated.possible() and isolated.call(work) == 0
        assert work() == 0 and not isolated.possible(), "numba's threads are at work here now"
    """)
