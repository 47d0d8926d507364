"""Messages on the terminal. During a run, those of libraries are written to a file instead."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

FILE = "warnings.log"  #: in the folder of a run, if libraries wrote any message
LONGEST = 1000  #: characters shown of a text from a file or a library
OURS = "qbench: "  #: warnings with this prefix are shown to the user


class _MessageLog:
    """Appends messages to the log file in `folder`. While `folder` is None, they wait in `waiting`."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.waiting: list[str] = []

    def add(self, message: str) -> None:
        self.waiting.append(f"{datetime.now():%Y-%m-%d %H:%M:%S} {message.rstrip()}\n")
        self.write()

    def write(self) -> None:
        if self.folder is None or not self.waiting:
            return
        text, self.waiting = "".join(self.waiting), []
        with suppress(OSError):  # writing the result reports a full disk
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / FILE).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)


_log: _MessageLog | None = None


def sanitize(text: str, most: int = LONGEST) -> str:
    """Returns `text` as one printable line of at most `most` characters, for a terminal or a page.

    Characters that cannot be seen are replaced by their codes, such as `\\x1b`. They could move the cursor, or change the
    direction of reading.
    """
    if len(text) > most:
        text = text[: most - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sanitize_all(value: Any) -> Any:
    """Returns a JSON value with every text in it passed through `sanitize`, keys too."""
    if isinstance(value, str):
        return sanitize(value)
    if isinstance(value, dict):
        return {sanitize(key): sanitize_all(item) for key, item in value.items()}
    return type(value)(map(sanitize_all, value)) if isinstance(value, list | tuple) else value


def replace_unencodable() -> None:
    """Print "?" for characters that the encoding of the terminal or pipe lacks, as is common on Windows."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def redirect(folder: Path | None = None) -> Iterator[None]:
    """Write the warnings and logs of libraries to `folder`/warnings.log instead of the terminal.

    Blocks may be nested. Without a folder, messages wait for an inner block with a folder; those left over are printed at
    the end. Warnings that begin with "qbench: " are printed at once. Logging to files is not affected.
    """
    global _log
    if _log is None:
        _log = _MessageLog()
        try:
            with _handled(_log), redirect(folder):
                yield
        finally:
            sys.stderr.write("".join(_log.waiting))
            _log = None
        return
    before, _log.folder = _log.folder, folder or _log.folder
    _log.write()
    try:
        yield
    finally:
        _log.folder = before


@contextmanager
def _handled(log: _MessageLog) -> Iterator[None]:
    """Pass every warning, and every log record for the terminal, to `log`."""
    show, handle = warnings.showwarning, logging.Handler.handle
    formatter = logging.Formatter("%(levelname)s %(name)s: %(message)s")

    def show_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if file is not None:
            show(message, category, filename, lineno, file, line)
        elif str(message).startswith(OURS):
            sys.stderr.write(f"{message}\n")
        else:
            log.add(warnings.formatwarning(message, category, filename, lineno, line))

    def handle_record(self: logging.Handler, record: logging.LogRecord) -> Any:
        if not _on_terminal(self):
            return handle(self, record)
        kept = self.filter(record)
        if kept and not getattr(record, "qbench_kept", False):  # another handler may have added it already
            record.qbench_kept = True
            try:
                text = formatter.format(record)
            except Exception:  # its arguments do not match its text
                text = f"{record.levelname} {record.name}: {record.msg} {record.args}"
            log.add(text)
        return kept

    warnings.showwarning = show_warning
    logging.Handler.handle = handle_record  # type: ignore[method-assign]
    try:
        yield
    finally:
        warnings.showwarning, logging.Handler.handle = show, handle  # type: ignore[method-assign]


def _on_terminal(handler: logging.Handler) -> bool:
    """Whether a handler writes to standard output or error, which may also be a pipe or the cell of a notebook."""
    stream = getattr(handler, "stream", None) or getattr(getattr(handler, "console", None), "file", None)  # or Rich's
    if stream is None or isinstance(handler, logging.FileHandler):
        return False
    if stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        return True
    try:
        return stream.fileno() in (1, 2)
    except (AttributeError, OSError, ValueError):
        return False
