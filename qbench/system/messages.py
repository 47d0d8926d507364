"""What the terminal shows: the messages of qbench. Those of libraries go to a file while a run lasts."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

MOST = 0.9  #: share of the weights below which it is not "the model" that is quantized
FILE = "warnings.log"  #: in the folder of a run, if there was any
LONGEST = 1000  #: characters of a text of others' that are shown
OURS = "qbench: "  #: how a warning begins that the user must see


class _Aside:
    """Where messages go: into `folder`, or while that is None, into `waiting`."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.waiting: list[str] = []

    def keep(self, message: str) -> None:
        self.waiting.append(f"{datetime.now():%Y-%m-%d %H:%M:%S} {message.rstrip()}\n")
        self.write()

    def write(self) -> None:
        if self.folder is None or not self.waiting:
            return
        text, self.waiting = "".join(self.waiting), []
        with suppress(OSError):  # a full disk is for the results to report
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / FILE).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)


_aside: _Aside | None = None


def left_in_words(layers: Mapping[str, str], share: float = 1.0) -> str:
    """Of weights that are not quantized, by name with the reason, a sentence; empty where there are none.

    share: of the weights that could be, the part that is quantized.
    """
    if not layers:
        return ""
    first, why = next(iter(layers.items()))
    others = f", and {len(layers) - 1} more" if len(layers) > 1 else ""
    only = "Only " if share < MOST else ""
    return f"{only}{100 * share:.1f}% of the weights are quantized. Left in 16 bit: {first}, as {why}{others}."


def visible(text: str, most: int = LONGEST) -> str:
    """The text as one line that a terminal or a page shows as it is, cut to `most` characters.

    What cannot be seen, such as what moves a cursor or turns the direction of reading, is there by its code: `\\x1b`.
    """
    if len(text) > most:
        text = text[: most - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def all_visible(value: Any) -> Any:
    """What JSON holds, with every text in it `visible`, keys too."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(key): all_visible(item) for key, item in value.items()}
    return type(value)(map(all_visible, value)) if isinstance(value, list | tuple) else value


def printable() -> None:
    """Print "?" for a character that the terminal's or a pipe's encoding lacks, as most of Windows' do."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def aside(folder: Path | None = None) -> Iterator[None]:
    """Write what libraries warn of or log meanwhile to `folder`/warnings.log instead of the terminal.

    Without a folder, messages wait for an `aside` within this one that has a folder. Those that none took are printed in
    the end. Warnings that begin with "qbench: " are printed at once. Logs that go to files still do.
    """
    global _aside
    if _aside is None:
        _aside = _Aside()
        try:
            with _handled(_aside), aside(folder):
                yield
        finally:
            sys.stderr.write("".join(_aside.waiting))
            _aside = None
        return
    before, _aside.folder = _aside.folder, folder or _aside.folder
    _aside.write()
    try:
        yield
    finally:
        _aside.folder = before


@contextmanager
def _handled(messages: _Aside) -> Iterator[None]:
    """Python hands each warning and each record for the terminal to `messages`."""
    show, handle = warnings.showwarning, logging.Handler.handle
    formatter = logging.Formatter("%(levelname)s %(name)s: %(message)s")

    def show_aside(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if file is not None:
            show(message, category, filename, lineno, file, line)
        elif str(message).startswith(OURS):
            sys.stderr.write(f"{message}\n")
        else:
            messages.keep(warnings.formatwarning(message, category, filename, lineno, line))

    def handle_aside(self: logging.Handler, record: logging.LogRecord) -> Any:
        if not _on_terminal(self):
            return handle(self, record)
        kept = self.filter(record)
        if kept and not getattr(record, "qbench_kept", False):  # where another handler brought it here
            record.qbench_kept = True
            try:
                text = formatter.format(record)
            except Exception:  # its arguments do not fit its text
                text = f"{record.levelname} {record.name}: {record.msg} {record.args}"
            messages.keep(text)
        return kept

    warnings.showwarning = show_aside
    logging.Handler.handle = handle_aside  # type: ignore[method-assign]
    try:
        yield
    finally:
        warnings.showwarning, logging.Handler.handle = show, handle  # type: ignore[method-assign]


def _on_terminal(handler: logging.Handler) -> bool:
    """Whether a handler writes to standard output or error, which may be a pipe or a cell of a notebook as well."""
    stream = getattr(handler, "stream", None) or getattr(getattr(handler, "console", None), "file", None)  # or Rich's
    if stream is None or isinstance(handler, logging.FileHandler):
        return False
    if stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        return True
    try:
        return stream.fileno() in (1, 2)
    except (AttributeError, OSError, ValueError):
        return False
