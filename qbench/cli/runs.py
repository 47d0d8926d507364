"""python -m qbench runs [PATH…]: list the folders of runs; --clean removes those without a finished result.

The paths are folders of runs or sweeps, by default runs/. Each run is one line: its folder, when it began, its format and
fine-tune, its status, its last perplexity, its size. --clean lists the folders to remove, and asks; --yes does not ask. A
folder stays if a run is in progress there, or if it holds a file that no run writes. --archive copies every result below
each path, unchanged, into one small file, PATH/results.jsonl.xz. Reports and `qbench.load` read it like the folders.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from qbench.errors import InputError
from qbench.report import wording
from qbench.results import archive, dataframe, store
from qbench.system import files, messages
from qbench.system.messages import sanitize

from .arguments import parse
from .console import stderr

HYDRAS = ".hydra"
NAMED = re.compile(r"_block.*_dq-.*_seed")  #: part of the folder names that conf/config.yaml sets
#: names of the files and folders that a run writes
OURS = re.compile(
    r"\.hydra|\.lock|\..+\.[0-9a-f]{16}|warnings\.log|result(-\w+)?\.json|report\.md|\w+\.png|adapter|lm_eval"
    r"|qbench|mlruns|mlartifacts|mlflow\.db|wandb"
)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and what it holds.

    result: None if none can be read. running: whether a process has locked it. finished: whether it holds a finished
    result, including one that was set aside. size: bytes.
    """

    folder: Path
    result: dict | None
    running: bool
    finished: bool
    size: int

    @property
    def status(self) -> str:
        if self.running:
            return "running"
        if self.result is None:
            return "no result"
        error = self.result["error"] or {"type": "unfinished"}
        return self.result["status"] if self.result["status"] == "done" else sanitize(error["type"], 30)

    def cells(self) -> list[str]:
        """The cells of its line in the list."""
        began, recipe, perplexity = "", "", ""
        if self.result:
            began = sanitize(self.result["run"]["started"][:16]).replace("T", " ")
            with suppress(KeyError, TypeError):  # a run that failed early has its configuration as typed
                recipe = wording.recipe_name(self.result["config"])
            scores = self.result["metrics"].get("quality", {})
            perplexity = next(
                (wording.format_number(scores[s]["perplexity"], ".2f") for s in wording.STAGES[::-1] if s in scores), ""
            )
        return [sanitize(str(self.folder)), began, recipe, self.status, perplexity, decimal(self.size)]


def main() -> int:
    """Returns 0 if done, 1 if nothing was archived, 2 if a path is not a folder, 130 if interrupted."""
    messages.replace_unencodable()
    try:
        arguments = parse("qbench.cli.runs", sys.argv[1:])
    except InputError as error:
        stderr.print(f"qbench: {error}")
        return 2
    paths = arguments.paths or [Path("runs")]
    if not arguments.paths and not paths[0].exists():
        print("there are no runs here yet")
        return 0
    for path in paths:
        if not path.is_dir():
            stderr.print(f"qbench: {sanitize(str(path))} is not a folder; accepted: folders of runs or sweeps")
            return 2
    if arguments.archive:
        return max(map(archive_results, paths))
    try:
        runs = [read(folder) for path in paths for folder in find(path)]
        if not arguments.clean:
            show(runs)
            return 0
        clean([run for run in runs if not run.finished and not run.running], paths, arguments.yes)
    except KeyboardInterrupt:
        stderr.print("qbench: interrupted")
        return 130
    return 0


def archive_results(path: Path) -> int:
    """Copy all results below a path into its archive, and print how many. Returns 0, or 1 if that fails."""
    try:
        count = archive.write(path, [file for file in dataframe.find_results(path) if not archive.is_archive(file)])
    except (InputError, OSError) as error:
        stderr.print(f"qbench: nothing was archived: {error}")
        return 1
    file = path / archive.FILE
    print(f"{sanitize(str(file))} has {wording.count(count, 'result')} in {decimal(file.stat().st_size)}")
    print("remove the folders of these runs, or a report counts each run twice")
    return 0


def find(path: Path) -> Iterator[Path]:
    """Find the folders of runs at or below a path, by their content, or by their name if they are empty."""
    for name, folders, files_here in os.walk(path):
        folders.sort()
        if store.FILE in files_here or HYDRAS in folders or NAMED.search(os.path.basename(name)):
            folders.clear()
            yield Path(name)


def read(folder: Path) -> RunFolder:
    """Read the folder of a run."""
    try:
        result = store.read(folder)
    except (OSError, InputError):
        result = None
    size = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
    return RunFolder(folder, result, files.is_locked(folder), _finished(folder), size)


def _finished(folder: Path) -> bool:
    for file in folder.glob("result*.json"):
        with suppress(OSError, InputError):
            if store.read(file)["status"] == "done":
                return True
    return False


def show(runs: Iterable[RunFolder]) -> None:
    """Print one line per run, in columns."""
    rows = [["folder", "began, UTC", "what", "status", "perplexity", "size"], *(run.cells() for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def clean(runs: list[RunFolder], paths: Iterable[Path], sure: bool) -> None:
    """Show folders, and remove them if the user or `sure` confirms. Folders of sweeps that are then empty go too."""
    if not runs:
        print("nothing to remove: each folder holds a finished result, or a run in progress")
        return
    show(runs)
    count, size = wording.count(len(runs), "folder"), decimal(sum(run.size for run in runs))
    if not sure and not _confirmed(f"remove {count}, {size}? [y/N] "):
        print("nothing was removed; --yes removes without a question")
        return
    for run in runs:
        if why := _remove(run.folder):
            stderr.print(f"qbench: {sanitize(str(run.folder))} stays: {why}")
    for parent in {run.folder.parent for run in runs}:
        if parent not in paths:
            files.remove_unused(parent, {"multirun.yaml"})


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _remove(folder: Path) -> str | None:
    """Remove the folder of a run. Returns the reason if it stays."""
    foreign = sorted(file.name for file in folder.iterdir() if not OURS.fullmatch(file.name))
    if foreign:
        return f"no run wrote {sanitize(foreign[0])}"
    try:
        with files.locked(folder):
            if _finished(folder):
                return "a run has finished there meanwhile"
            shutil.rmtree(folder)
    except files.Busy:
        return "a run is in progress there"
    except OSError as error:
        return sanitize(str(error))
    return None
