"""Text to tokens, with a held-out part that is the same for every model, tokenizer and seed.

None of it needs a model: a tokenizer, the size of the model's vocabulary and the length of a window suffice.
"""

import codecs
import gzip
import hashlib
import json
import lzma
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from formats.contract import first_line
from qbench.errors import InputError
from qbench.system.messages import OURS

TEXTS = Path(__file__).parents[1] / "assets" / "text"
PIECE = 4096  #: characters a piece, about; one piece in HELD_OUT is held out
HELD_OUT = 10
_CHUNK = 2**24  #: bytes read at once
_PACKED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\0": lzma.open,
}  #: by a file's first bytes
_MARKS = {  # the longer first, as one begins with another
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_JSON = (".json", ".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx")
_SPACE = re.compile(r"\s*")
_OBJECT = 'an object with the whole document, such as a prompt and its answer, under "text"'


@dataclass
class Text:
    """train, held_out: pieces of text, in order. whole: whether a piece is a document. digest: SHA-256 of the file.

    empty, repeated: documents that were left out before the split, as they hold no text, and after it from `train`, as
    they are held out as well.
    """

    train: list[str]
    held_out: list[str]
    digest: str
    whole: bool = False
    empty: int = 0
    repeated: int = 0

    def documents(self) -> list[str]:
        """Those to train on: of a text its paragraphs, which blank lines part."""
        parts = self.train if self.whole else [part for piece in self.train for part in re.split(r"\n\s*\n", piece)]
        return [part.strip() for part in parts if part.strip()]

    def metrics(self) -> dict:
        """What the file was split into, as the result has it."""
        return {
            "unit": "documents" if self.whole else "pieces",
            "held_out": len(self.held_out),
            "train": len(self.train),
            "empty": self.empty,
            "repeated": self.repeated,
        }


def read(path: str) -> Text:
    """Read a text file, packed by gzip or xz or not; a bare name such as `kjv` is a bundled text.

    JSON objects, a line each or in a list, each have a document under "text", which is a piece; those without text are
    dropped. Any other text is cut at line ends into pieces of about 4096 characters, fewer in a short text: by characters,
    so that models with different tokenizers are scored on the same text. Every tenth piece is held out, of fewer the last.
    Text is UTF-8, or what its byte order mark says. Raises InputError.
    """
    file = _place(path)
    suffix = next((s for s in map(str.lower, reversed(file.suffixes)) if s not in (".gz", ".xz")), "")
    if suffix in _TABLES:
        raise _refused(path, "is a table, which pandas' to_json(orient='records', lines=True) turns into JSON lines")
    with _reading(path):
        raw = _content(file)
        digest, text = hashlib.sha256(raw).hexdigest(), _decoded(raw)
        del raw  # a large text is held once
        if "\0" in text:
            raise _refused(path, "holds NUL characters, as binary files do, and UTF-16 without a byte order mark")
        whole = suffix in _JSON or _holds_objects(text)
        found = _documents(text, path) if whole else _pieces(text)
        pieces = [piece for piece in found if piece.strip()] if whole else found
    if len(pieces) < 2:
        raise _refused(path, "holds a single document, and one is to be held out" if pieces else "holds no text")
    at = set(range(HELD_OUT - 1, len(pieces), HELD_OUT)) or {len(pieces) - 1}
    held_out = [pieces[i] for i in sorted(at)]
    rest = [piece for i, piece in enumerate(pieces) if i not in at]
    train = _without(rest, held_out) if whole else rest
    if not train:
        raise _refused(path, "holds one document again and again, and one is to be held out")
    return Text(train, held_out, digest, whole, len(found) - len(pieces), len(rest) - len(train))


def _place(path: str) -> Path:
    # os.path's functions raise for no path whatever, those of Path do
    file, bundled = Path(os.path.expanduser(path)), TEXTS / f"{path}.txt.xz"
    for place in (file, bundled):
        if os.path.isfile(place):
            return place
    raise _refused(path, "is no regular file" if os.path.exists(file) else "does not exist")


def _refused(path: str, why: str) -> InputError:
    names = ", ".join(sorted(text.name.removesuffix(".txt.xz") for text in TEXTS.glob("*.txt.xz")))
    accepted = f'a UTF-8 text, JSON objects {{"text": "…"}} a line each or in a list (.gz, .xz too), or {names}'
    return InputError(f"data.path: {path!r:.300} {why}; accepted: {accepted}")


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        reason = first_line(error)
        raise InputError(f"data.path: {path!r:.300} cannot be read as UTF-8 text: {reason}") from error
    except MemoryError as error:
        raise _refused(path, "is larger, unpacked, than the memory has room for, a quarter of what is free") from error


def _content(file: Path) -> bytearray:
    """The bytes of a file, unpacked. Raises MemoryError beyond a quarter of what is free: small archives may hold more."""
    limit = psutil.virtual_memory().available // 4
    with file.open("rb") as stream:
        first = stream.read(max(map(len, _PACKED)))
    opened = next((opener for mark, opener in _PACKED.items() if first.startswith(mark)), open)
    raw = bytearray()
    with opened(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            raw += chunk
            if len(raw) > limit:
                raise MemoryError
    return raw


def _decoded(raw: bytearray) -> str:
    return raw.decode(next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8-sig"))


def _holds_objects(text: str) -> bool:
    """Whether a text, whatever its name, begins with a JSON object or a list of them."""
    at = _next(text, 0)
    if text[at : at + 1] not in ("{", "["):
        return False
    try:
        first, _ = json.JSONDecoder().raw_decode(text, at)
    except ValueError:
        return False
    except RecursionError:
        return True
    return bool(first) and (isinstance(first, dict) or all(isinstance(item, dict) for item in first))


def _next(text: str, at: int) -> int:
    """Where the next character is that is no white space."""
    found = _SPACE.match(text, at)
    assert found
    return found.end()


def _documents(text: str, path: str) -> list[str]:
    """The "text" of each of the JSON objects that follow one another, or lie in lists. Raises InputError."""
    decoder, found, at = json.JSONDecoder(), list[str](), _next(text, 0)

    def refused(why: str, item: int | None = None) -> InputError:
        place = f"line {1 + text.count(chr(10), 0, at)}{f', item {item}' if item else ''}"
        return InputError(f"data.path: {place} of {path!r:.300} {why}; accepted: {_OBJECT}")

    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except RecursionError as error:
            raise refused("is nested too deep") from error
        except ValueError as error:
            raise refused(f"is no JSON ({first_line(error)})") from error
        listed = isinstance(value, list)
        for item, entry in enumerate(value if listed else [value], 1):
            if why := _problem(entry):
                raise refused(why, item if listed else None)
            found.append(f"{entry['text']}\n\n")
        at = _next(text, end)
    return found


def _problem(entry: Any) -> str | None:
    """Why a JSON value is no document."""
    if not isinstance(entry, dict):
        return "is no object"
    if "text" not in entry:
        keys = ", ".join(f"{key!r:.40}" for key in islice(entry, 8))
        return f'has no "text", but {keys or "nothing"}'
    if not isinstance(entry["text"], str):
        return 'has a "text" that is no string'
    try:
        entry["text"].encode()
    except UnicodeEncodeError:
        return 'has half a character in its "text", a lone surrogate'
    return None


def _pieces(text: str) -> list[str]:
    size = max(1, min(PIECE, len(text) // (2 * HELD_OUT)))
    pieces: list[str] = []
    current: list[str] = []
    length = 0
    for line in [] if text.isspace() else text.splitlines(keepends=True):
        for part in [line[i : i + size] for i in range(0, len(line), size)]:
            current.append(part)
            length += len(part)
            if length >= size:
                pieces.append("".join(current))
                current, length = [], 0
    return [*pieces, "".join(current)] if current else pieces


def _without(documents: list[str], others: list[str]) -> list[str]:
    known = {other.strip() for other in others}
    return [document for document in documents if document.strip() not in known]


def held_out(text: Text, tokenizer: PreTrainedTokenizerBase, vocabulary: int, seq: int, tokens: int) -> Tensor:
    """The windows to score, int64 [n, seq]: so many that `tokens` have a score, or all there are, and then a warning.

    The same for every seed. Raises InputError as `windows` does.
    """
    wanted = -(tokens // -(seq - 1))
    found = windows(text.held_out, tokenizer, vocabulary, seq, wanted, seed=0)
    if len(found) < wanted:
        there = len(found) * (seq - 1)
        warnings.warn(
            f"{OURS}eval.tokens: {tokens} are more than the {there} held out; all of these are scored", stacklevel=2
        )
    return found


def windows(
    pieces: list[str], tokenizer: PreTrainedTokenizerBase, vocabulary: int, seq: int, count: int, seed: int
) -> Tensor:
    """At most `count` windows of `seq` tokens, int64 [n, seq], from pieces taken in an order that `seed` shuffles.

    Every window begins with the tokenizer's beginning-of-text token (end-of-text where it has no other), which gives the
    first token of text something to follow; with one only, where the text brings its own. Raises InputError if the text
    does not fill one window, and for a tokenizer that does not fit the text or the model.
    """
    start = _start(tokenizer)
    stream: list[int] = []
    for tokens in _encoded(pieces, tokenizer, seed):
        stream += tokens
        if len(stream) >= count * seq:
            break
    _check_known(stream, pieces, tokenizer)
    found = [part for part in islice(_parts(stream, start, seq), count) if len(part) == seq]
    if not found:
        raise InputError(f"data.path: the text has {len(stream)} tokens here, less than one window of data.seq={seq}")
    _check(max(map(max, found)), vocabulary)
    return torch.tensor(found)


def examples(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, vocabulary: int, seq: int, count: int, seed: int
) -> list[Tensor]:
    """At most `count` examples, int64 [length ≤ seq] each, of documents taken in an order that `seed` shuffles.

    A document begins as a window does and ends with the tokenizer's end-of-text token; a longer one is several examples.
    Raises InputError as `windows` does.
    """
    start, end = _start(tokenizer), tokenizer.eos_token_id
    found: list[list[int]] = []
    stream: list[int] = []
    for tokens in _encoded(documents, tokenizer, seed):
        if len(found) >= count:
            break
        stream += tokens
        ended = tokens if end is None or tokens[-1:] in ([], [end]) else [*tokens, end]
        found += [part for part in _parts(ended, start, seq) if len(part) > 1]  # else there is nothing to predict
    _check_known(stream, documents, tokenizer)
    if not found:
        raise InputError("data.path: the text has no document of two tokens to train on")
    _check(max(map(max, found)), vocabulary)
    return [torch.tensor(part) for part in found[:count]]


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[list[int]]:
    """The tokens of each text. Raises InputError."""
    for i in np.random.default_rng(seed).permutation(len(texts)):
        try:
            yield tokenizer(texts[i], add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(f"model.path: its tokenizer cannot encode the text: {first_line(error)}") from error


def _parts(tokens: list[int], start: int | None, seq: int) -> Iterator[list[int]]:
    """The tokens in parts of `seq`, the last of what is left, each of which begins with `start` once."""
    at = 0
    while at < len(tokens):
        mark = [] if start is None or tokens[at] == start else [start]
        room = seq - len(mark)
        yield mark + tokens[at : at + room]
        at += room


def _start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _check_known(tokens: list[int], texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    if texts and all(token == tokenizer.unk_token_id for token in tokens):
        raise InputError(
            f"model.path: its tokenizer knows no token of the text, such as {texts[0].strip()[:40]!r}; accepted: the"
            " tokenizer that the model was trained with"
        )


def _check(largest: int, vocabulary: int) -> None:
    if largest >= vocabulary:
        raise InputError(f"model.path: its tokenizer makes token {largest}, but the model knows {vocabulary} tokens")


def pick_seq(seq: int | str, model: PreTrainedModel, usual: int = 256) -> int:
    """Tokens a window: `auto` is the usual, or as many as the model has positions. Raises InputError for more."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    if isinstance(seq, str):  # auto
        return min(usual, positions) if positions > 0 else usual
    if 0 < positions < seq:  # XLNet's -1 is no limit
        raise InputError(
            f"data.seq: {seq} is more than the model's {positions} positions; accepted: auto, or up to those"
        )
    return seq
