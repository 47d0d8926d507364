"""Links from a page to the results behind it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from qbench.results import archive
from qbench.system.messages import sanitize


@dataclass(frozen=True)
class Source:
    """The result of a run. link: from the page to its file. run: its name in an archive of many results, or empty."""

    seed: int
    link: str
    run: str


def list_sources(files: Mapping[int, Path], folder: Path) -> list[Source]:
    """The results behind a row, for a page in `folder`. files: by seed."""
    return [
        Source(seed, link_to(file, folder), _run_in_archive(file) if archive.on_disk(file) != file else "")
        for seed, file in files.items()
    ]


def link_to(file: Path, folder: Path) -> str:
    """The relative link from a page in `folder` to a result, or to the archive that contains it."""
    path = os.path.relpath(archive.on_disk(file), folder)
    return quote(os.fsencode(path).replace(os.fsencode(os.sep), b"/"))


def _run_in_archive(file: Path) -> str:
    """The name of a run for the title of a Markdown link, which stands in double quotes."""
    return sanitize(file.parent.name, 100).replace('"', "'")
