"""Text to windows of tokens, with a held-out part that is the same for every model, tokenizer and seed."""

import gzip
import hashlib
import lzma
from dataclasses import dataclass
from pathlib import Path

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
    """train, held_out: pieces of text, in order. digest: SHA-256 of the whole."""

    train: list[str]
    held_out: list[str]
    digest: str


def read(path: str) -> Text:
    """Read a UTF-8 text file (.gz and .xz are unpacked); a bare name such as `kjv` is a bundled text.

    The text is cut at line ends into pieces of about 4096 characters, fewer in a short text, and every tenth is held
    out: by characters, so that models with different tokenizers are scored on the same text. Raises InputError.
    """
    file = Path(path).expanduser()
    bundled = TEXTS / f"{path}.txt.xz"
    if not file.is_file() and bundled.is_file():
        file = bundled
    if not file.is_file():
        names = ", ".join(sorted(t.name.removesuffix(".txt.xz") for t in TEXTS.glob("*.txt.xz")))
        raise InputError(f"data.path: {path!r} does not exist; accepted: a UTF-8 text file (.gz, .xz too), or {names}")
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(file.suffix, open)
    try:
        with opener(file, "rb") as stream:
            raw = stream.read()
        text = raw.decode()
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise InputError(f"data.path: {path!r} cannot be read as UTF-8 text: {error}") from error
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
    pieces.append("".join(current))
    held_out = pieces[HELD_OUT - 1 :: HELD_OUT] or pieces
    train = [piece for i, piece in enumerate(pieces) if i % HELD_OUT != HELD_OUT - 1]
    return Text(train, held_out, hashlib.sha256(raw).hexdigest())


def windows(
    pieces: list[str], tokenizer: PreTrainedTokenizerBase, vocabulary: int, seq: int, count: int, seed: int
) -> Tensor:
    """At most `count` windows of `seq` tokens, int64 [n, seq], from pieces taken in an order that `seed` shuffles.

    Every window begins with the tokenizer's beginning-of-text token (end-of-text where it has no other), which gives the
    first token of text something to follow. Raises InputError if the text does not fill one window, or has tokens beyond
    the model's vocabulary.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    room = seq - (start is not None)
    stream: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(pieces)):
        stream += tokenizer(pieces[i], add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= count * room:
            break
    n = min(len(stream) // room, count)
    if n == 0:
        raise InputError(f"data.path: the text has {len(stream)} tokens here, less than one window of data.seq={seq}")
    if (largest := max(stream)) >= vocabulary:
        raise InputError(f"model.path: its tokenizer makes token {largest}, but the model knows {vocabulary} tokens")
    body = torch.tensor(stream[: n * room]).view(n, room)
    return body if start is None else torch.cat([torch.full((n, 1), start), body], 1)
