"""Text to windows: what is held out, what a window begins with, what is refused."""

import gzip

import pytest
from transformers import AutoTokenizer

from qbench import data
from qbench.errors import InputError
from qbench.models import BUNDLED


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.mark.parametrize("name", ["kjv", "docs"])
def test_the_bundled_texts(name):
    text = data.read(name)
    whole = sum(map(len, text.train + text.held_out))
    assert whole > 200_000
    assert 0.08 < sum(map(len, text.held_out)) / whole < 0.12
    assert not set(text.train) & set(text.held_out)


def test_no_character_is_lost(tmp_path):
    content = "".join(f"line {i} of a text\n" for i in range(3000)) + "x" * 20_000
    (tmp_path / "a.txt").write_text(content)
    text = data.read(str(tmp_path / "a.txt"))
    pieces, held_out, train = [], iter(text.held_out), iter(text.train)
    for i in range(len(text.train) + len(text.held_out)):
        pieces.append(next(held_out if i % data.HELD_OUT == data.HELD_OUT - 1 else train))
    assert "".join(pieces) == content


def test_gzip(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"word " * 1000))
    assert sum(map(len, data.read(str(tmp_path / "a.gz")).train)) > 4000


def test_windows(tokenizer):
    text = data.read("kjv")
    found = data.windows(text.held_out, tokenizer, 4096, 64, 10, seed=0)
    assert found.shape == (10, 64) and (found[:, 0] == tokenizer.bos_token_id).all()
    assert (data.windows(text.held_out, tokenizer, 4096, 64, 10, seed=0) == found).all()
    assert (data.windows(text.held_out, tokenizer, 4096, 64, 10, seed=1) != found).any()
    words = tokenizer.decode(found[0, 1:])
    assert any(words[5:60] in piece for piece in text.held_out)


@pytest.mark.parametrize("content", [b"", b"too short", b"\xff\xfe\x00broken"])
def test_bad_texts(tmp_path, tokenizer, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"data\.path"):
        data.windows(data.read(str(tmp_path / "a.txt")).held_out, tokenizer, 4096, 64, 4, seed=0)


def test_a_truncated_archive(tmp_path):
    (tmp_path / "a.xz").write_bytes((data.TEXTS / "kjv.txt.xz").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"a\.xz.*cannot be read"):
        data.read(str(tmp_path / "a.xz"))


def test_a_vocabulary_too_small_for_the_tokenizer(tokenizer):
    with pytest.raises(InputError, match=r"token \d+, but the model knows 100 tokens"):
        data.windows(data.read("kjv").held_out, tokenizer, 100, 64, 4, seed=0)
