"""Reads text and turns it into tokens. The held-out part is the same for every model, tokenizer and seed.

No model is needed, only a tokenizer, the vocabulary size and the length of a window.
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
PIECE = 4096  #: about this many characters make a piece; one piece in HELD_OUT is held out
HELD_OUT = 10
_CHUNK = 2**24  #: bytes read at once
_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\0": lzma.open,
}  #: by the first bytes of a file
_BYTE_ORDER_MARKS = {  # the mark of utf-32-le starts with that of utf-16-le, so longer ones come first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx")
_WHITE_SPACE = re.compile(r"\s*")
_ACCEPTED_OBJECT = 'an object with the whole document, such as a prompt and its answer, under "text"'


@dataclass
class Text:
    """A text, split into pieces in their order.

    digest: SHA-256 of the unpacked file. whole: whether each piece is a document. empty: documents without text, dropped
    before the split. repeated: documents dropped from `train` because they are held out too.
    """

    train: list[str]
    held_out: list[str]
    digest: str
    whole: bool = False
    empty: int = 0
    repeated: int = 0

    def documents(self) -> list[str]:
        """The documents to train on; if pieces are not documents, the paragraphs between blank lines."""
        parts = self.train if self.whole else [part for piece in self.train for part in re.split(r"\n\s*\n", piece)]
        return [part.strip() for part in parts if part.strip()]

    def metrics(self) -> dict:
        """The counts of the split, as in result.json."""
        return {
            "unit": "documents" if self.whole else "pieces",
            "held_out": len(self.held_out),
            "train": len(self.train),
            "empty": self.empty,
            "repeated": self.repeated,
        }


def read(path: str) -> Text:
    """Read a text file and split it into pieces to train on and pieces to hold out.

    path: a file, also one packed with gzip or xz, or the name of a bundled text such as `kjv`. Text is UTF-8, unless a
    byte order mark says otherwise.

    JSON objects, one a line or in a list, are documents: the "text" of each is a piece, and empty ones are dropped. Other
    text is cut at line ends into pieces of about 4096 characters, or fewer in a short text. It is cut by characters, so
    that models with different tokenizers are scored on the same text. Every tenth piece is held out; if there are fewer
    than ten, the last one is. Raises InputError.
    """
    file = _find_file(path)
    suffix = next((s for s in map(str.lower, reversed(file.suffixes)) if s not in (".gz", ".xz")), "")
    if suffix in _TABLE_SUFFIXES:
        raise _bad_path(path, "is a table, which pandas' to_json(orient='records', lines=True) turns into JSON lines")
    with _reading_errors(path):
        raw = _read_bytes(file)
        digest, text = hashlib.sha256(raw).hexdigest(), _decode_text(raw)
        del raw  # do not hold a large text twice
        if "\0" in text:
            raise _bad_path(path, "holds NUL characters, as binary files do, and UTF-16 without a byte order mark")
        whole = suffix in _JSON_SUFFIXES or _holds_objects(text)
        all_pieces = _parse_documents(text, path) if whole else _cut_pieces(text)
        pieces = [piece for piece in all_pieces if piece.strip()] if whole else all_pieces
    if len(pieces) < 2:
        raise _bad_path(path, "holds a single document, and one is to be held out" if pieces else "holds no text")
    indices = set(range(HELD_OUT - 1, len(pieces), HELD_OUT)) or {len(pieces) - 1}
    held_out = [pieces[i] for i in sorted(indices)]
    rest = [piece for i, piece in enumerate(pieces) if i not in indices]
    train = _drop_repeated(rest, held_out) if whole else rest
    if not train:
        raise _bad_path(path, "holds one document again and again, and one is to be held out")
    return Text(train, held_out, digest, whole, len(all_pieces) - len(pieces), len(rest) - len(train))


def _find_file(path: str) -> Path:
    # the functions of os.path never raise here, unlike the methods of Path
    file, bundled = Path(os.path.expanduser(path)), TEXTS / f"{path}.txt.xz"
    for candidate in (file, bundled):
        if os.path.isfile(candidate):
            return candidate
    raise _bad_path(path, "is no regular file" if os.path.exists(file) else "does not exist")


def _bad_path(path: str, why: str) -> InputError:
    names = ", ".join(sorted(text.name.removesuffix(".txt.xz") for text in TEXTS.glob("*.txt.xz")))
    accepted = f'a UTF-8 text, JSON objects {{"text": "…"}} a line each or in a list (.gz, .xz too), or {names}'
    return InputError(f"data.path: {path!r:.300} {why}; accepted: {accepted}")


@contextmanager
def _reading_errors(path: str) -> Iterator[None]:
    """Raise InputError for the errors of reading and decoding a file."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        reason = first_line(error)
        raise InputError(f"data.path: {path!r:.300} cannot be read as UTF-8 text: {reason}") from error
    except MemoryError as error:
        raise _bad_path(path, "takes, unpacked, more than a quarter of the free memory") from error


def _read_bytes(file: Path) -> bytearray:
    """The unpacked bytes of a file. Raises MemoryError if they take more than a quarter of the free memory."""
    limit = psutil.virtual_memory().available // 4
    with file.open("rb") as stream:
        first = stream.read(max(map(len, _OPENERS)))
    opened = next((opener for mark, opener in _OPENERS.items() if first.startswith(mark)), open)
    raw = bytearray()
    with opened(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            raw += chunk
            if len(raw) > limit:
                raise MemoryError
    return raw


def _decode_text(raw: bytearray) -> str:
    return raw.decode(next((name for mark, name in _BYTE_ORDER_MARKS.items() if raw.startswith(mark)), "utf-8-sig"))


def _holds_objects(text: str) -> bool:
    """Whether a text begins with a JSON object or a list of them."""
    start = _skip_space(text, 0)
    if text[start : start + 1] not in ("{", "["):
        return False
    try:
        first, _ = json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return False
    except RecursionError:
        return True
    return bool(first) and (isinstance(first, dict) or all(isinstance(item, dict) for item in first))


def _skip_space(text: str, start: int) -> int:
    """The index of the first character from `start` on that is not white space."""
    space = _WHITE_SPACE.match(text, start)
    assert space, "it matches an empty string"
    return space.end()


def _parse_documents(text: str, path: str) -> list[str]:
    """The "text" of each JSON object of a sequence of objects and lists of objects. Raises InputError."""
    decoder, documents, start = json.JSONDecoder(), list[str](), _skip_space(text, 0)

    def refused(why: str, item: int | None = None) -> InputError:
        place = f"line {1 + text.count(chr(10), 0, start)}{f', item {item}' if item else ''}"
        return InputError(f"data.path: {place} of {path!r:.300} {why}; accepted: {_ACCEPTED_OBJECT}")

    while start < len(text):
        try:
            value, end = decoder.raw_decode(text, start)
        except RecursionError as error:
            raise refused("is nested too deep") from error
        except ValueError as error:
            raise refused(f"is no JSON ({first_line(error)})") from error
        listed = isinstance(value, list)
        for item, entry in enumerate(value if listed else [value], 1):
            if why := _why_no_document(entry):
                raise refused(why, item if listed else None)
            documents.append(f"{entry['text']}\n\n")
        start = _skip_space(text, end)
    return documents


def _why_no_document(entry: Any) -> str | None:
    """Why a JSON value is not a document; None if it is one."""
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


def _cut_pieces(text: str) -> list[str]:
    """Cut a text at line ends, and within long lines, into pieces of PIECE characters, or fewer in a short text."""
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


def _drop_repeated(documents: list[str], others: list[str]) -> list[str]:
    known = {other.strip() for other in others}
    return [document for document in documents if document.strip() not in known]


def held_out(text: Text, tokenizer: PreTrainedTokenizerBase, vocabulary: int, seq: int, tokens: int) -> Tensor:
    """The windows to score, int64 [n, seq], enough for `tokens` scored tokens; they do not depend on the run's seed.

    If the text is too short, all its windows are returned, with a warning. Raises InputError as `windows` does.
    """
    wanted = -(tokens // -(seq - 1))
    held_out_windows = windows(text.held_out, tokenizer, vocabulary, seq, wanted, seed=0)
    if len(held_out_windows) < wanted:
        available = len(held_out_windows) * (seq - 1)
        warnings.warn(
            f"{OURS}eval.tokens: {tokens} are more than the {available} held out; all of these are scored", stacklevel=2
        )
    return held_out_windows


def windows(
    pieces: list[str], tokenizer: PreTrainedTokenizerBase, vocabulary: int, seq: int, count: int, seed: int
) -> Tensor:
    """At most `count` windows of `seq` tokens, int64 [n, seq], from pieces in an order shuffled with `seed`.

    Every window begins with the tokenizer's beginning-of-text token, or else its end-of-text token, so that the first
    token of text has a context. The token is not doubled if the text already has it. Raises InputError if the text does
    not fill one window, and for a tokenizer that does not fit the text or the model.
    """
    start = _start_token(tokenizer)
    stream: list[int] = []
    for tokens in _encode_texts(pieces, tokenizer, seed):
        stream += tokens
        if len(stream) >= count * seq:
            break
    _check_known_tokens(stream, pieces, tokenizer)
    full = [part for part in islice(_split_tokens(stream, start, seq), count) if len(part) == seq]
    if not full:
        raise InputError(f"data.path: the text has {len(stream)} tokens here, less than one window of data.seq={seq}")
    _check_vocabulary(max(map(max, full)), vocabulary)
    return torch.tensor(full)


def examples(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, vocabulary: int, seq: int, count: int, seed: int
) -> list[Tensor]:
    """At most `count` examples, int64 [length ≤ seq] each, from documents in an order shuffled with `seed`.

    A document begins as a window does and ends with the end-of-text token. One that is too long becomes several examples.
    Raises InputError as `windows` does.
    """
    start, end = _start_token(tokenizer), tokenizer.eos_token_id
    parts: list[list[int]] = []
    stream: list[int] = []
    for tokens in _encode_texts(documents, tokenizer, seed):
        if len(parts) >= count:
            break
        stream += tokens
        ended = tokens if end is None or tokens[-1:] in ([], [end]) else [*tokens, end]
        parts += [part for part in _split_tokens(ended, start, seq) if len(part) > 1]  # a single token predicts nothing
    _check_known_tokens(stream, documents, tokenizer)
    if not parts:
        raise InputError("data.path: the text has no document of two tokens to train on")
    _check_vocabulary(max(map(max, parts)), vocabulary)
    return [torch.tensor(part) for part in parts[:count]]


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[list[int]]:
    """Yield the tokens of each text, in an order shuffled with `seed`. Raises InputError."""
    for i in np.random.default_rng(seed).permutation(len(texts)):
        try:
            yield tokenizer(texts[i], add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(f"model.path: its tokenizer cannot encode the text: {first_line(error)}") from error


def _split_tokens(tokens: list[int], start: int | None, seq: int) -> Iterator[list[int]]:
    """Split tokens into parts of `seq`, each beginning with `start` once; the last part may be shorter."""
    position = 0
    while position < len(tokens):
        prefix = [] if start is None or tokens[position] == start else [start]
        room = seq - len(prefix)
        yield prefix + tokens[position : position + room]
        position += room


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _check_known_tokens(tokens: list[int], texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    if texts and all(token == tokenizer.unk_token_id for token in tokens):
        raise InputError(
            f"model.path: its tokenizer knows no token of the text, such as {texts[0].strip()[:40]!r}; accepted: the"
            " tokenizer that the model was trained with"
        )


def _check_vocabulary(largest: int, vocabulary: int) -> None:
    if largest >= vocabulary:
        raise InputError(f"model.path: its tokenizer makes token {largest}, but the model knows {vocabulary} tokens")


def pick_seq(seq: int | str, model: PreTrainedModel, usual: int = 256) -> int:
    """The tokens of a window: `auto` is `usual`, or the model's positions if fewer. Raises InputError for too many."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    if isinstance(seq, str):  # auto
        return min(usual, positions) if positions > 0 else usual
    if 0 < positions < seq:  # XLNet has -1, no limit
        raise InputError(
            f"data.seq: {seq} is more than the model's {positions} positions; accepted: auto, or up to those"
        )
    return seq
