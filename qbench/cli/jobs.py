"""The job that Hydra runs, once or for each point of a sweep, in this process or a child."""

import gc
import hashlib
import json
import mmap
import os
import signal
import time
from contextlib import suppress
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
from .sweep import Outcome, Progress
from .time_limit import time_limit, too_long

if TYPE_CHECKING:
    from qbench.settings import Settings

BASELINES = "baselines"  #: subfolder of a sweep, for the measurements that its runs share
RUNS = Path("runs")  #: default folder of single runs
GRACE = 5.0  #: seconds after its timeout that a run has to report it, before it is killed


def config_hash(*, _root_: DictConfig) -> str:
    """The value of `${config_hash:}`, which makes the folder names of different configurations differ."""
    return short_hash(resolve(_root_))


def short_hash(config: dict) -> str:
    """Eight hexadecimal digits that identify a resolved configuration.

    Block and dq count only within `format`, because 16 bit has neither.
    """
    decisive = {key: value for key, value in config.items() if key not in ("timeout", "track", "block", "dq")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]


OmegaConf.register_new_resolver("config_hash", config_hash, replace=True)


def settings_of(config: dict, fmt: formats.Format | None = None) -> "Settings":
    """The typed settings of a resolved config. fmt: a format to use instead of the config's. Raises InputError."""
    from qbench.settings import Settings, parts

    return Settings(
        format=fmt or format_of(config),
        **parts(config),
        seed=config["seed"],
        device=config["device"],
    )


progress = Progress()  #: progress of the sweep that this process runs


def job(config: DictConfig) -> Outcome:
    """Do one run, in the folder that Hydra names, and in a child process if possible."""
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
    """Remove the folder of a single run that never began."""
    store.remove_unbegun(folder)
    if folder.parent == RUNS.absolute():
        with suppress(OSError):  # it holds other runs, or does not exist
            RUNS.rmdir()


class _Attempt:
    """One attempt at a run of a resolved configuration. sweep: the folder of its sweep; None for a single run."""

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
            self._set_why(again if self._recorded() else "nothing had been measured")
        return Outcome(self.folder, code, self._why[:].rstrip(b"\0").decode(errors="ignore"))

    def _start(self) -> int:
        """Run in a child process if possible, else in this one. Returns the exit code."""
        with interruptible(), stderr.status("starting"):  # transformers and PEFT take seconds to import
            from qbench.checkpoint import loading
            from qbench.runs import isolated
            from qbench.runs.experiment import run  # noqa: F401  imported before the fork, for the child
        if not isolated.possible():
            return self._run()
        with suppress(OSError):  # the run reports weights that cannot be read
            loading.remember_digests(self.config["model"]["path"])
        timeout = self.config["timeout"]
        limit = timeout + GRACE if timeout and keys.RUN["timeout"].allows(timeout) else None
        gc.freeze()  # else a collection walks through all that was imported, as long as a small run takes
        try:
            code = isolated.call(self._run, limit)
        except TimeoutError:
            return self._ended(RunTimeout(too_long(timeout)))
        finally:
            gc.unfreeze()
        if code < 0:
            return self._ended(_by_signal(-code))
        if code == 0 and self.sweep and (result := store.read_started_since(self.folder, self.started)):
            with suppress(Exception):  # if the model is gone by now, the next run reports it
                loading.keep_in_memory(**result["config"]["model"])
        return code

    def _run(self) -> int:
        """Do the run. Returns the exit code; every error is reported here, and none is raised."""
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
            gc.collect()  # free a failed run's model before the next run
        before = result["run"]["started"] < self.started
        if self.sweep:
            terminal.show_line(result, before)
            return 0
        terminal.show(result, self.folder)
        if before:
            stderr.print(f"qbench: this run is done already; to repeat it, remove {os.path.relpath(self.folder)} first")
        return 0

    def _checked(self) -> tuple["Settings", tuple[str, ...]]:
        """Check the configuration. Returns settings and trackers. Raises InputError and Busy."""
        from qbench.runs import trackers

        with (
            files.locked(self.folder),
            store.record_failure(self.folder, store.new_result(self.config), in_sweep=bool(self.sweep)),
        ):
            keys.RUN["timeout"].check("timeout", self.config["timeout"])
            return settings_of(self.config), trackers.checked(self.config["track"])

    def _ended(self, error: BaseException) -> int:
        """Record the error that ended the child process, unless the run recorded one. Returns the exit code."""
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
        """Whether result.json has the error of this attempt. A full disk or a finished result may prevent that."""
        result = store.read_started_since(self.folder, self.started)
        return bool(result and result["error"])

    def _failed(self, error: BaseException) -> int:
        """Report an error on the terminal and in the outcome. Returns the exit code."""
        expected = isinstance(error, InputError | Busy)
        line = str(error) if expected else f"{type(error).__name__}: {error}"
        stays = "; the result that had finished there stays" if store.read_finished(self.folder) else ""
        self._set_why("running elsewhere" if isinstance(error, Busy) else line + stays)
        if not expected and self._recorded():
            line += f" (traceback in {self._file})"
        elif not isinstance(error, InputError | Busy | OSError | RunTimeout):
            line += f"\n{store.describe_error(error)['traceback'].rstrip()}"
        stderr.print(f"qbench: {line}")
        return 2 if isinstance(error, InputError) else 1

    def _set_why(self, why: str) -> None:
        """Set the `why` of the outcome, also from the child process."""
        self._why[:] = why.encode(errors="replace")[: len(self._why)].ljust(len(self._why), b"\0")

    @property
    def _file(self) -> str:
        return f"{os.path.relpath(self.folder)}/{store.FILE}"


def _by_signal(number: int) -> Exception:
    """The error of a process that a signal ended."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return MemoryError(f"{name} ended the process, as the system does when memory runs out")
    return RuntimeError(f"{name} ended the process")
