"""Many results in one file, results.jsonl.xz. Each line is a run: its path, and the whole content of its result.json.

    {"path": "nf4_block64_seed0/result.json", "result": {"schema": 1, "status": "done", ...}}

A sweep of a hundred runs takes 350 kB instead of 5 MB, and no number changes. `xz -dc results.jsonl.xz` prints the lines.
The path of a result in an archive is FOLDER/results.jsonl.xz/nf4_block64_seed0/result.json.
"""

import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from qbench.errors import InputError
from qbench.system import files
from qbench.system.messages import sanitize

from . import json_files, store

FILE = "results.jsonl.xz"
ENDING = ".jsonl.xz"
LARGEST = 4 << 30  #: decompressed bytes of an archive; ten thousand results have some 400 MB
MOST = 100_000  #: lines of an archive
MEMORY = 256 << 20  #: bytes that decompression may use; `xz -9` needs 65 MiB
PIECE = 1 << 20


def write(folder: Path, results: Iterable[Path]) -> int:
    """Add result.json files below `folder` to `folder`/results.jsonl.xz. Returns how many results that then holds.

    A result that is already there stays, unless a file with the same path replaces it. The files stay too. Raises
    InputError if a file or the old archive is damaged.
    """
    new = {file.relative_to(folder).as_posix(): file for file in results}
    names = set(new)
    with files.atomic_write(folder / FILE) as partial, lzma.open(partial, "wb") as out:
        if (folder / FILE).exists():
            for path, result in read(folder / FILE):
                if isinstance(result, InputError):
                    raise result
                name = path.relative_to(folder / FILE).as_posix()
                if name not in new:
                    names.add(name)
                    out.write(_line(name, result))
        for name, file in sorted(new.items()):
            out.write(_line(name, store.read_file(file)))
    return len(names)


def _line(name: str, result: dict) -> bytes:
    try:
        return json.dumps({"path": name, "result": result}, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    except ValueError:  # Python reads the JSON number 1e999 as infinite
        raise InputError(f"{sanitize(name)} has a number that is not finite; null is accepted") from None


def read(file: Path) -> Iterator[tuple[Path, dict | InputError]]:
    """Yield each result of an archive with its path. For an invalid line, yield ARCHIVE:LINE with the error.

    Reads one line at a time. Raises OSError, and InputError if the rest of the archive cannot be read.
    """
    seen: set[str] = set()
    for number, line in enumerate(_lines(file), 1):
        place = Path(f"{file}:{number}")
        try:
            name, result = _parsed(line, str(place))
            if name in seen:
                raise InputError(f"{sanitize(str(place))} has the path of an earlier line: {sanitize(name, 100)}")
        except InputError as error:
            yield place, error
        else:
            seen.add(name)
            yield file / name, result


def _parsed(line: bytes, place: str) -> tuple[str, dict]:
    """The path and the result in a line. place: names the line in messages. Raises InputError."""
    entry = json_files.parse_json(line, place, **store.NUMBERS)
    if not isinstance(entry, dict) or entry.keys() != {"path", "result"} or not isinstance(entry["path"], str):
        raise InputError(f'{sanitize(place)} is not {{"path": "RUN/result.json", "result": {{...}}}}')
    name = PurePosixPath(entry["path"])
    if not name.name or ".." in name.parts or not Path("a", name).is_relative_to("a"):
        raise InputError(f"{sanitize(place)} has the path {sanitize(entry['path'], 100)}; RUN/result.json is accepted")
    return str(name), store.check_result(entry["result"], place)


def _lines(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed in pieces and within limits. Raises OSError and InputError."""
    json_files.check_regular(file)
    shown = sanitize(str(file))
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)
    rest, size, count = b"", 0, 0
    with file.open("rb") as compressed:
        while not unpacker.eof:
            data = compressed.read(PIECE) if unpacker.needs_input else b""
            if unpacker.needs_input and not data:
                raise InputError(f"{shown} is cut short after line {count}")
            try:
                piece = unpacker.decompress(data, PIECE)
            except lzma.LZMAError as error:
                raise InputError(f"{shown} is damaged after line {count}: {sanitize(str(error), 200)}") from error
            size += len(piece)
            *whole, rest = (rest + piece).split(b"\n") if b"\n" in piece else (rest + piece,)
            count += len(whole)
            if size > LARGEST or count > MOST or len(rest) > json_files.LARGEST:
                raise InputError(
                    f"{shown} is too large, after line {count}; up to {MOST:,} lines of {json_files.LARGEST:,} bytes,"
                    f" {LARGEST:,} in all, are accepted"
                )
            yield from whole
        if unpacker.unused_data or compressed.read(1):
            raise InputError(f"{shown} has other data after the compressed results")
    if rest:
        yield rest


def is_archive(path: Path) -> bool:
    """Whether a file is an archive, by its name."""
    return path.name.endswith(ENDING)


def on_disk(path: Path) -> Path:
    """The file that a result was read from: its result.json, or the archive that it is in."""
    return next((parent for parent in path.parents if is_archive(parent) and parent.is_file()), path)
