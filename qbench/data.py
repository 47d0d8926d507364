"""Text to tokens, with a held-out part that is the same for every model, tokenizer and seed."""

import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import InputError

TEXTS = Path(__file__).parent / "assets" / "text"
PIECE = 4096  #: characters a piece, about; one piece in HELD_OUT is held out
HELD_OUT = 10


@dataclass
class Text:
    """train, held_out: pieces of text, in order. whole: whether a piece is a document. digest: SHA-256 of the file."""

    train: list[str]
    held_out: list[str]
    digest: str
    whole: bool = False

    def documents(self) -> list[str]:
        """Those to train on: of a text its paragraphs, which blank lines part."""
        parts = self.train if self.whole else [part for piece in self.train for part in re.split(r"\n\s*\n", piece)]
        return [part.strip() for part in parts if part.strip()]


def read(path: str) -> Text:
    """Read a UTF-8 text file (.gz and .xz are unpacked); a bare name such as `kjv` is a bundled text.

    A .jsonl file has a JSON object a line, whose "text" is a document and a piece. Any other text is cut at line ends into
    pieces of about 4096 characters, fewer in a short text: by characters, so that models with different tokenizers are
    scored on the same text. Every tenth piece is held out. Raises InputError.
    """
    file = Path(path).expanduser()
    bundled = TEXTS / f"{path}.txt.xz"
    if not file.is_file() and bundled.is_file():
        file = bundled
    if not file.is_file():
        names = ", ".join(sorted(t.name.removesuffix(".txt.xz") for t in TEXTS.glob("*.txt.xz")))
        raise InputError(
            f"data.path: {path!r} does not exist; accepted: a UTF-8 text or .jsonl file (.gz, .xz too), or {names}"
        )
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    try:
        with openers.get(file.suffix, open)(file, "rb") as stream:
            raw = stream.read()
        text = raw.decode()
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise InputError(f"data.path: {path!r} cannot be read as UTF-8 text: {error}") from error
    whole = ".jsonl" in file.suffixes
    pieces = _documents(text, path) if whole else _pieces(text)
    held_out = pieces[HELD_OUT - 1 :: HELD_OUT] or pieces
    train = [piece for i, piece in enumerate(pieces) if i % HELD_OUT != HELD_OUT - 1]
    return Text(train, held_out, hashlib.sha256(raw).hexdigest(), whole)


def _documents(lines: str, path: str) -> list[str]:
    found = []
    for number, line in enumerate(lines.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            text = None
        if not isinstance(text, str):
            raise InputError(f'data.path: line {number} of {path!r} is not accepted; an object {{"text": "…"}} is')
        found.append(f"{text}\n\n")
    return found


def _pieces(text: str) -> list[str]:
    size = max(1, min(PIECE, len(text) // (2 * HELD_OUT)))
    pieces, current = [], []
    length = 0
    for line in text.splitlines(keepends=True):
        for part in [line[i : i + size] for i in range(0, len(line), size)]:
            current.append(part)
            length += len(part)
            if length >= size:
                pieces.append("".join(current))
                current, length = [], 0
    return [*pieces, "".join(current)]


def windows(
    pieces: list[str], tokenizer: PreTrainedTokenizerBase, vocabulary: int, seq: int, count: int, seed: int
) -> Tensor:
    """At most `count` windows of `seq` tokens, int64 [n, seq], from pieces taken in an order that `seed` shuffles.

    Every window begins with the tokenizer's beginning-of-text token (end-of-text where it has no other), which gives the
    first token of text something to follow. Raises InputError if the text does not fill one window, or has tokens beyond
    the model's vocabulary.
    """
    start = _start(tokenizer)
    room = seq - (start is not None)
    stream: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(pieces)):
        stream += tokenizer(pieces[i], add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= count * room:
            break
    n = min(len(stream) // room, count)
    if n == 0:
        raise InputError(f"data.path: the text has {len(stream)} tokens here, less than one window of data.seq={seq}")
    _check(max(stream), vocabulary)
    body = torch.tensor(stream[: n * room]).view(n, room)
    return body if start is None else torch.cat([torch.full((n, 1), start), body], 1)


def examples(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, vocabulary: int, seq: int, count: int, seed: int
) -> list[Tensor]:
    """At most `count` examples, int64 [length ≤ seq] each, of documents taken in an order that `seed` shuffles.

    A document begins as a window does and ends with the tokenizer's end-of-text token; a longer one is several examples.
    Raises InputError as `windows` does.
    """
    start, end = _start(tokenizer), tokenizer.eos_token_id
    room = seq - (start is not None)
    found: list[Tensor] = []
    for i in np.random.default_rng(seed).permutation(len(documents)):
        if len(found) >= count:
            break
        tokens = tokenizer(documents[i], add_special_tokens=False, verbose=False)["input_ids"]
        tokens += [end] if end is not None else []
        for begin in range(0, len(tokens), room):
            part = [*([start] if start is not None else []), *tokens[begin : begin + room]]
            if len(part) > 1:  # else there is nothing to predict
                found.append(torch.tensor(part))
    if not found:
        raise InputError("data.path: the text has no document of two tokens to train on")
    _check(max(int(part.max()) for part in found), vocabulary)
    return found[:count]


def _start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _check(largest: int, vocabulary: int) -> None:
    if largest >= vocabulary:
        raise InputError(f"model.path: its tokenizer makes token {largest}, but the model knows {vocabulary} tokens")
