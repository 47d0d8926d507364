"""python -m qbench runs [PATH…]: list what runs have left; --clean removes what holds no finished result.

The paths are folders of runs or sweeps, by default runs/. A line a run: its folder, when it began, what it was of, what
came of it, its last perplexity, its size. --clean names the folders that would go, and asks; --yes does not ask. A folder
stays where a run is in progress, or where something lies that no run leaves. --archive copies every result below each
path, unchanged, into one small file, PATH/results.jsonl.xz, which reports and `qbench.load` read as they read the folders.
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
NAMED = re.compile(r"_block.*_dq-.*_seed")  #: in the names that conf/config.yaml gives
#: what a run leaves, by name
OURS = re.compile(
    r"\.hydra|\.lock|\..+\.[0-9a-f]{16}|warnings\.log|result(-\w+)?\.json|report\.md|\w+\.png|adapter|lm_eval"
    r"|qbench|mlruns|mlartifacts|mlflow\.db|wandb"
)


@dataclass(frozen=True)
class Left:
    """What a run left. result: None where there is none that can be read. running: a process is at it. finished: it holds
    a finished result, also one of the same configuration that was set aside. size: bytes.
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
        """As a line of the list has them."""
        began, recipe, perplexity = "", "", ""
        if self.result:
            began = sanitize(self.result["run"]["started"][:16]).replace("T", " ")
            with suppress(KeyError, TypeError):  # what failed early has its configuration as it was typed
                recipe = wording.recipe_name(self.result["config"])
            scores = self.result["metrics"].get("quality", {})
            perplexity = next(
                (wording.format_number(scores[s]["perplexity"], ".2f") for s in wording.STAGES[::-1] if s in scores), ""
            )
        return [sanitize(str(self.folder)), began, recipe, self.status, perplexity, decimal(self.size)]


def main() -> int:
    """0: done; 2: a path is no folder; 130: interrupted."""
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
            stderr.print(f"qbench: {sanitize(str(path))} is no folder; accepted: folders of runs or sweeps")
            return 2
    if arguments.archive:
        return max(map(archived, paths))
    try:
        left = [read(folder) for path in paths for folder in find(path)]
        if not arguments.clean:
            show(left)
            return 0
        clean([run for run in left if not run.finished and not run.running], paths, arguments.yes)
    except KeyboardInterrupt:
        stderr.print("qbench: interrupted")
        return 130
    return 0


def archived(path: Path) -> int:
    """Copy all results below a path into its archive, and say so. Returns 0, or 1 where that cannot be done."""
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
    """The folders of runs at or below a path: by what is in them, or by their name, for they may be empty."""
    for name, folders, files_here in os.walk(path):
        folders.sort()
        if store.FILE in files_here or HYDRAS in folders or NAMED.search(os.path.basename(name)):
            folders.clear()
            yield Path(name)


def read(folder: Path) -> Left:
    """What a run left in a folder, or is at there."""
    try:
        result = store.read(folder)
    except (OSError, InputError):
        result = None
    size = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
    return Left(folder, result, files.is_locked(folder), _finished(folder), size)


def _finished(folder: Path) -> bool:
    for file in folder.glob("result*.json"):
        with suppress(OSError, InputError):
            if store.read(file)["status"] == "done":
                return True
    return False


def show(left: Iterable[Left]) -> None:
    """Print a line a run, in columns."""
    rows = [["folder", "began, UTC", "what", "status", "perplexity", "size"], *(run.cells() for run in left)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def clean(left: list[Left], paths: Iterable[Path], sure: bool) -> None:
    """Remove folders once they were shown, and a person or `sure` has said yes; those of sweeps as well that are then
    empty."""
    if not left:
        print("nothing to remove: each folder holds a finished result, or a run in progress")
        return
    show(left)
    count, size = wording.count(len(left), "folder"), decimal(sum(run.size for run in left))
    if not sure and not _confirmed(f"remove {count}, {size}? [y/N] "):
        print("nothing was removed; --yes removes without a question")
        return
    for run in left:
        if why := _remove(run.folder):
            stderr.print(f"qbench: {sanitize(str(run.folder))} stays: {why}")
    for parent in {run.folder.parent for run in left}:
        if parent not in paths:
            files.remove_unused(parent, {"multirun.yaml"})


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _remove(folder: Path) -> str | None:
    """Remove the folder of a run; where it stays, why."""
    foreign = sorted(file.name for file in folder.iterdir() if not OURS.fullmatch(file.name))
    if foreign:
        return f"no run has left {sanitize(foreign[0])}"
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
