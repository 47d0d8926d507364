"""What Hydra runs, once or for each point of a sweep, here or in another process."""

import _thread
import gc
import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import formats
from qbench import messages, record
from qbench.arguments import INTERRUPTED, plain, stderr
from qbench.errors import InputError, RunTimeout
from qbench.files import Busy
from qbench.groups import format_of
from qbench.imports import interruptible

if TYPE_CHECKING:
    from qbench.settings import Settings

BASELINES = "baselines"  #: folder in a sweep's, of what its runs share while it lasts


def config_hash(*, _root_: DictConfig) -> str:
    """`${config_hash:}` tells a configuration from others, in the name of its folder.

    Block and dq count as the format takes them: 16 bit knows neither.
    """
    decisive = {key: value for key, value in plain(_root_).items() if key not in ("timeout", "track", "block", "dq")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]


OmegaConf.register_new_resolver("config_hash", config_hash, replace=True)


def settings_of(config: dict, fmt: formats.Format | None = None) -> "Settings":
    """The typed settings of a resolved config; fmt: one to take for what it says. Raises InputError."""
    from qbench.settings import Settings, parts

    return Settings(
        format=fmt or format_of(config),
        **parts(config),
        seed=config["seed"],
        device=config["device"],
    )


codes: list[int] = []  #: what came of the jobs of this process: 0 done, 1 failed, 2 bad input


def job(config: DictConfig) -> None:
    """One run, into the folder that Hydra names, in a process of its own where that can be."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with messages.aside(folder):
        _job(config, folder)


def _job(config: DictConfig, folder: Path) -> None:
    hydra, settled = HydraConfig.get(), plain(config)
    sweep, started = None, record.now()
    if hydra.mode == RunMode.MULTIRUN:
        sweep = Path(hydra.sweep.dir)
    with interruptible(), stderr.status("starting"):  # transformers and PEFT take seconds to import
        from qbench import fresh, models
        from qbench.experiment import run  # noqa: F401  so that a child has it
    attempt = partial(_attempt, settled, folder, sweep, started)
    if not fresh.possible():
        codes.append(attempt())
    else:
        with suppress(OSError):  # weights that cannot be read are for the run to tell
            models.remember_digests(settled["model"]["path"])
        gc.freeze()  # what the imports made will not go: looking through it would take as long as a small run
        try:
            codes.append(fresh.call(attempt))
        finally:
            gc.unfreeze()
        if codes[-1] < 0:
            codes[-1] = 0 if _done(folder, started) else _killed(-codes[-1], settled, folder)
        elif codes[-1] == 0 and sweep and (done := _done(folder, started)):
            with suppress(Exception):  # a model that has gone meanwhile is the next run's to tell
                models.keep(**done["config"]["model"])
    if codes[-1] == INTERRUPTED:
        raise KeyboardInterrupt


def _done(folder: Path, started: str) -> dict | None:
    """The result in a folder if it was finished since."""
    with suppress(InputError, OSError):
        result = record.read(folder)
        return result if result["status"] == "done" and result["run"]["started"] >= started else None
    return None


def _attempt(config: dict, folder: Path, sweep: Path | None, started: str) -> int:
    """In a sweep, whatever goes wrong is a result as well. Returns the exit code of the run."""
    from qbench import track
    from qbench.experiment import run
    from qbench.report import terminal

    try:
        with record.kept(folder, record.blank(config)) if sweep else nullcontext():
            settings, trackers = settings_of(config), track.checked(config["track"])
        with time_limit(config["timeout"]):
            result = run(settings, folder, sweep and sweep / BASELINES, trackers)
    except InputError as error:
        stderr.print(f"qbench: {error}")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except (Exception, RunTimeout) as error:
        if isinstance(error, Busy):
            stderr.print(f"qbench: {error}")
        else:
            stderr.print(f"qbench: {type(error).__name__}: {error} (traceback in {_named(folder)})")
        return 1
    finally:
        gc.collect()  # a failed run's model goes before the next comes
    if sweep:
        terminal.show_line(result, before=result["run"]["started"] < started)
    else:
        terminal.show(result, folder)
    return 0


def _killed(number: int, config: dict, folder: Path) -> int:
    """Record that a signal ended the process of a run; returns its exit code."""
    name = signal.Signals(number).name
    hint = ", as the system does to one for which memory does not suffice" if number == signal.SIGKILL else ""
    ended = (MemoryError if hint else RuntimeError)(f"{name} ended the process{hint}")
    with suppress(type(ended)), record.kept(folder, record.blank(config)):
        raise ended
    stderr.print(f"qbench: {ended} (in {_named(folder)})")
    return 1


def _named(folder: Path) -> str:
    return f"{os.path.relpath(folder)}/{record.FILE}"


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise RunTimeout inside after so many seconds; None sets no limit."""
    if seconds is None:
        yield
        return
    with (_alarm if hasattr(signal, "setitimer") else _interrupt)(seconds):
        yield


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise RunTimeout(_too_long(seconds))

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _interrupt(seconds: float) -> Iterator[None]:
    """`_alarm` for a system without alarms, such as Windows: a thread interrupts this one, as Ctrl-C does."""
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
                raise RunTimeout(_too_long(seconds))
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


def _too_long(seconds: float) -> str:
    return f"the run took longer than timeout={seconds} s"
