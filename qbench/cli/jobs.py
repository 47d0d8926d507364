"""What Hydra runs, once or for each point of a sweep, here or in another process."""

import gc
import hashlib
import json
import mmap
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import formats
from qbench import keys
from qbench.errors import InputError, RunTimeout
from qbench.results import store
from qbench.system import files, messages
from qbench.system.files import Busy
from qbench.system.interrupts import interruptible

from .compose import resolve
from .console import INTERRUPTED, stderr
from .format_group import format_of
from .sweep import Progress
from .time_limit import time_limit, too_long

if TYPE_CHECKING:
    from qbench.settings import Settings

BASELINES = "baselines"  #: folder in a sweep's, of what its runs share while it lasts
RUNS = Path("runs")  #: folder of single runs, where none is named
GRACE = 5.0  #: seconds that a run has, beyond its timeout, to tell of it itself


def config_hash(*, _root_: DictConfig) -> str:
    """`${config_hash:}` tells a configuration from others, in the name of its folder."""
    return short_hash(resolve(_root_))


def short_hash(config: dict) -> str:
    """Eight digits that tell a resolved configuration from others.

    Block and dq count as the format takes them: 16 bit knows neither.
    """
    decisive = {key: value for key, value in config.items() if key not in ("timeout", "track", "block", "dq")}
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


progress = Progress()  #: of the sweep that this process runs
outcomes: list["Outcome"] = []  #: what came of the runs that were asked for


@dataclass(frozen=True)
class Outcome:
    """What came of a run. code: 0 done, 1 failed, 2 bad input, 130 interrupted. why: it is not done, in words.

    Each process that makes or unpickles one lists it in `outcomes`. Thus what a job returns in a process of a launcher is
    known to the process that asked for it.
    """

    folder: Path
    code: int
    why: str

    def __post_init__(self) -> None:
        outcomes.append(self)

    def __reduce__(self) -> tuple:
        return Outcome, (self.folder, self.code, self.why)


def job(config: DictConfig) -> Outcome:
    """One run, into the folder that Hydra names, in a process of its own where that can be."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
    try:
        with messages.redirect(folder):
            if sweep:
                stderr.print(progress.describe(hydra.job.num, folder), style="dim")
            started = time.monotonic()
            attempt = _Attempt(resolve(config), folder, sweep)
            outcome = attempt.outcome()
            if outcome.code == 0 and store.read_started_since(
                folder, attempt.started
            ):  # else it failed or was done before
                progress.seconds.append(time.monotonic() - started)
    finally:
        if not sweep:
            _discard(folder)
    if outcome.code == INTERRUPTED:
        raise KeyboardInterrupt
    return outcome


def _discard(folder: Path) -> None:
    """Leave nothing of a single run that never began."""
    store.remove_unbegun(folder)
    if folder.parent == RUNS.absolute():
        with suppress(OSError):  # it holds other runs, or has gone
            RUNS.rmdir()


class _Attempt:
    """One attempt at a run of a resolved configuration. sweep: the folder of the sweep that it is of, or None."""

    def __init__(self, config: dict, folder: Path, sweep: Path | None):
        self.config, self.folder, self.sweep, self.started = config, folder, sweep, store.timestamp()
        self._why = mmap.mmap(-1, mmap.PAGESIZE)  # memory that a forked child shares

    def outcome(self) -> Outcome:
        try:
            code = self._start()
        except KeyboardInterrupt:
            code = INTERRUPTED
        if code == INTERRUPTED:
            again = f"what was measured is in {self._file}; the same command does this run again, in the same folder"
            self._tell(again if self._recorded() else "nothing had been measured")
        return Outcome(self.folder, code, self._why[:].rstrip(b"\0").decode(errors="ignore"))

    def _start(self) -> int:
        """Run in a child, or where there can be none, here. Returns the exit code."""
        with interruptible(), stderr.status("starting"):  # transformers and PEFT take seconds to import
            from qbench.checkpoint import loading
            from qbench.runs import isolated
            from qbench.runs.experiment import run  # noqa: F401  so that a child has it
        if not isolated.possible():
            return self._run()
        with suppress(OSError):  # weights that cannot be read are for the run to tell
            loading.remember_digests(self.config["model"]["path"])
        timeout = self.config["timeout"]
        limit = timeout + GRACE if timeout and keys.RUN["timeout"].allows(timeout) else None
        gc.freeze()  # what the imports made will not go: looking through it would take as long as a small run
        try:
            code = isolated.call(self._run, limit)
        except TimeoutError:
            return self._ended(RunTimeout(too_long(timeout)))
        finally:
            gc.unfreeze()
        if code < 0:
            return self._ended(_by_signal(-code))
        if code == 0 and self.sweep and (result := store.read_started_since(self.folder, self.started)):
            with suppress(Exception):  # a model that has gone meanwhile is the next run's to tell
                loading.keep_in_memory(**result["config"]["model"])
        return code

    def _run(self) -> int:
        """The run itself. Returns the exit code. In a sweep, whatever goes wrong is a result as well."""
        from qbench.report.run import terminal
        from qbench.runs.experiment import run

        try:
            settings, trackers = self._checked()
            with time_limit(self.config["timeout"]):
                result = run(settings, self.folder, self.sweep and self.sweep / BASELINES, trackers)
        except KeyboardInterrupt:
            return INTERRUPTED
        except (Exception, RunTimeout) as error:
            return self._failed(error)
        finally:
            gc.collect()  # a failed run's model goes before the next comes
        before = result["run"]["started"] < self.started
        if self.sweep:
            terminal.show_line(result, before)
            return 0
        terminal.show(result, self.folder)
        if before:
            stderr.print(f"qbench: done before, and not again; for that, remove {os.path.relpath(self.folder)} first")
        return 0

    def _checked(self) -> tuple["Settings", tuple[str, ...]]:
        """What the configuration asks for. Raises InputError and Busy."""
        from qbench.runs import trackers

        with (
            files.locked(self.folder),
            store.record_failure(self.folder, store.new_result(self.config), in_sweep=bool(self.sweep)),
        ):
            keys.RUN["timeout"].check("timeout", self.config["timeout"])
            return settings_of(self.config), trackers.checked(self.config["track"])

    def _ended(self, error: BaseException) -> int:
        """Record what ended the process of a run, unless that had recorded its end itself. Returns the exit code."""
        result = store.read_started_since(self.folder, self.started)
        if result and result["status"] == "done":
            return 0
        if not self._recorded():
            with (
                suppress(type(error), Busy, OSError),
                files.locked(self.folder),
                store.record_failure(self.folder, result or store.new_result(self.config)),
            ):
                raise error
        return self._failed(error)

    def _recorded(self) -> bool:
        """Whether result.json tells what went wrong in this attempt. A full disk, or a finished result, may prevent it."""
        result = store.read_started_since(self.folder, self.started)
        return bool(result and result["error"])

    def _failed(self, error: BaseException) -> int:
        """Tell a person what went wrong, and `outcome`. Returns the exit code."""
        expected = isinstance(error, InputError | Busy)
        line = str(error) if expected else f"{type(error).__name__}: {error}"
        stays = "; the result that had finished there stays" if store.read_finished(self.folder) else ""
        self._tell("running elsewhere" if isinstance(error, Busy) else line + stays)
        if not expected and self._recorded():
            line += f" (traceback in {self._file})"
        elif not isinstance(error, InputError | Busy | OSError | RunTimeout):
            line += f"\n{store.describe_error(error)['traceback'].rstrip()}"
        stderr.print(f"qbench: {line}")
        return 2 if isinstance(error, InputError) else 1

    def _tell(self, why: str) -> None:
        self._why[:] = why.encode(errors="replace")[: len(self._why)].ljust(len(self._why), b"\0")

    @property
    def _file(self) -> str:
        return f"{os.path.relpath(self.folder)}/{store.FILE}"


def _by_signal(number: int) -> Exception:
    """What a signal that ended a process means."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return MemoryError(f"{name} ended the process, as the system does to one for which memory does not suffice")
    return RuntimeError(f"{name} ended the process")
