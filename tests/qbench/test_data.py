"""Text to windows: what is held out, what a window begins with, what is refused."""

import gzip
import json

import pytest
import torch
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


def jsonl(file, documents):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return data.read(str(file))


def test_a_line_of_json_is_a_document_whatever_it_holds(tmp_path):
    documents = [f"question {i}?\n\nanswer {i}." for i in range(25)]
    text = jsonl(tmp_path / "a.jsonl", documents)
    assert text.documents() == [d for i, d in enumerate(documents) if i % 10 != 9]
    assert [piece.strip() for piece in text.held_out] == documents[9::10]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert data.read(str(tmp_path / "b.jsonl.gz")).documents() == text.documents()


@pytest.mark.parametrize("line", ["plain", "[1]", '{"content": "x"}', '{"text": 3}', "3"])
def test_a_line_that_is_no_document(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line)
    with pytest.raises(InputError, match=r"line 3 of .*accepted"):
        data.read(str(tmp_path / "a.jsonl"))


def test_paragraphs_are_the_documents_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\nof it\n \n" for i in range(400)))
    documents = data.read(str(tmp_path / "a.txt")).documents()
    whole = [d for d in documents if d.startswith("line") and d.endswith("of it")]
    assert len(documents) > 300 and len(whole) > 0.8 * len(documents), "a cut between pieces may part one"


def test_examples(tmp_path, tokenizer):
    """Every token of a document, in examples of at most seq tokens, each with a beginning, the last with an end."""
    long = " ".join(f"word{i}" for i in range(100))
    text = jsonl(tmp_path / "a.jsonl", ["short", long, "", "a"])
    found = data.examples(text.documents(), tokenizer, 4096, 64, 100, seed=0)
    assert all(len(e) <= 64 and e[0] == tokenizer.bos_token_id for e in found)
    parts = [e for e in found if len(e) > 10]
    assert tokenizer.decode(torch.cat([e[1:] for e in parts])[:-1]) == long
    assert {int(e[-1]) for e in found if len(e) < 64} == {tokenizer.eos_token_id}
    assert len(data.examples(text.documents(), tokenizer, 4096, 64, 2, seed=0)) == 2
    with pytest.raises(InputError, match="knows 100 tokens"):
        data.examples(text.documents(), tokenizer, 100, 64, 4, seed=0)
    with pytest.raises(InputError, match="no document"):
        data.examples([], tokenizer, 4096, 64, 4, seed=0)
