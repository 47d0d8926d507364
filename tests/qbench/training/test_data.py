"""Text to windows: which part is held out, how windows begin, and which files are refused."""

import gzip
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import formats
from qbench.checkpoint.location import BUNDLED
from qbench.errors import InputError
from qbench.runs.experiment import run
from qbench.settings import DataSettings, EvalSettings, ModelSettings, Settings, TuneSettings
from qbench.training import data


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


SPLITS = {  # published results are of these, which no change of the reading may move
    "kjv": ("6cd15cffa1634bcd", "a0cc2f63d3a537ec", "7eccff7726292969"),
    "docs": ("c627d6e138756c23", "35e0ca23281136d7", "b9866f7749b638de"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_split_of_the_bundled_texts_stays_as_it_is(name, tokenizer):
    text = data.read(name)
    scored = data.windows(text.held_out, tokenizer, 4096, 256, 1000, seed=0)
    trained = data.windows(text.train, tokenizer, 4096, 256, 160, seed=1)
    parts = json.dumps([text.train, text.held_out]).encode(), scored.numpy().tobytes(), trained.numpy().tobytes()
    assert tuple(hashlib.sha256(part).hexdigest()[:16] for part in parts) == SPLITS[name]
    assert text.metrics() == {
        "unit": "pieces", "held_out": len(text.held_out), "train": len(text.train), "empty": 0, "repeated": 0
    }  # fmt: skip


def joined(text: data.Text) -> str:
    """All pieces of a text, in their order."""
    held_out, train = iter(text.held_out), iter(text.train)
    count = len(text.train) + len(text.held_out)
    last = count < data.HELD_OUT
    return "".join(
        next(held_out if (i == count - 1 if last else i % data.HELD_OUT == data.HELD_OUT - 1) else train)
        for i in range(count)
    )


def written(name: str, content: bytes) -> data.Text:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        return data.read(f"{folder}/{name}")


@given(st.text(st.sampled_from("ab \n\r\t\u2028\x85\x0cé😀"), min_size=1, max_size=300))
def test_of_any_text_nothing_is_lost_and_something_is_held_out(content):
    text = written("a.txt", f"x{content}".encode())
    assert joined(text) == f"x{content}" and text.train and text.held_out and all(text.train + text.held_out)
    assert written("a.txt", f"x{content}".encode()) == text


@given(st.lists(st.sampled_from(["", " \n", *"abcdefghijklmnopqrstuvwxyz"]) | st.text(max_size=5), max_size=60))
def test_documents_are_trained_on_or_held_out_never_both(documents):
    content = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    filled = [document.strip() for document in documents if document.strip()]
    if len(set(filled)) < 2:
        with pytest.raises(InputError, match=r"holds (no text|a single document|one document again and again)"):
            written("a.jsonl", content)
        return
    try:
        text = written("a.jsonl", content)
    except InputError as error:  # those to train on are all held out as well
        assert "again and again" in str(error)
        return
    train, held_out = ([piece.strip() for piece in pieces] for pieces in (text.train, text.held_out))
    assert train and held_out and not set(train) & set(held_out) and set(train) | set(held_out) == set(filled)
    assert held_out == (filled[9::10] or filled[-1:]) and train == [d for d in filled if d not in set(held_out)]
    assert text.empty == len(documents) - len(filled)
    assert sum(v for v in text.metrics().values() if isinstance(v, int)) == len(documents)


def test_no_character_is_lost(tmp_path):
    content = "".join(f"line {i} of a text\n" for i in range(3000)) + "x" * 20_000
    (tmp_path / "a.txt").write_text(content)
    assert joined(data.read(str(tmp_path / "a.txt"))) == content


def test_gzip(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"word " * 1000))
    assert sum(map(len, data.read(str(tmp_path / "a.gz")).train)) > 4000


def test_windows(tokenizer):
    text = data.read("kjv")
    windows = data.windows(text.held_out, tokenizer, 4096, 64, 10, seed=0)
    assert windows.shape == (10, 64) and (windows[:, 0] == tokenizer.bos_token_id).all()
    assert (data.windows(text.held_out, tokenizer, 4096, 64, 10, seed=0) == windows).all()
    assert (data.windows(text.held_out, tokenizer, 4096, 64, 10, seed=1) != windows).any()
    words = tokenizer.decode(windows[0, 1:])
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
    with pytest.raises(InputError, match=r"line 3(, item 1)? of .*accepted"):
        data.read(str(tmp_path / "a.jsonl"))


ROWS = [{"text": f"document {i} ", "id": i} for i in range(25)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "a.JSONL": LINES,
        "b.ndjson": LINES,
        "c.json": LINES,
        "d.txt": LINES,
        "without a suffix": LINES,
        "e.json": json.dumps(ROWS),
        "f.JSON": json.dumps(ROWS, indent=2),
        "g.txt": json.dumps(ROWS),
        "h.jsonl": LINES.replace("\n", "\r\n"),
        "i.json": "\n\n".join(json.dumps(row, indent=1) for row in ROWS),
    }.items(),
)
def test_documents_are_found_whatever_the_name(tmp_path, name, content):
    text = written(name, content.encode())
    assert text.whole and text.documents() == [row["text"].strip() for i, row in enumerate(ROWS) if i % 10 != 9]
    assert written(f"{name}.gz", gzip.compress(content.encode())).train == text.train
    assert written(name, gzip.compress(content.encode())).train == text.train, "whatever it is packed by"


@pytest.mark.parametrize("content", ["{not JSON} at all\n", "[1] A reference.\n", "[Illustration]\n", "{}\n"])
def test_a_text_that_begins_with_a_bracket_is_a_text(content):
    assert not written("a.txt", content.encode() * 300).whole


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(("name", "content"), {"a.txt": "Ein Anfang – und so fort.\n" * 40, "a.jsonl": LINES}.items())
def test_byte_order_marks_are_understood_and_no_text(encoding, name, content):
    marked, plain = (written(name, content.encode(e)) for e in (encoding, "utf-8"))
    assert (marked.train, marked.held_out, marked.whole) == (plain.train, plain.held_out, plain.whole)


ALPACA = [{"instruction": "Name a colour.", "input": "", "output": "Red."}] * 30
CHAT = [{"messages": [{"role": "user", "content": "Name a colour."}]}] * 30
DEEP = "[" * 100_000
REFUSED = {
    "alpaca.json": (
        json.dumps(ALPACA),
        r"line 1, item 1 of .*has no \"text\", but 'instruction', 'input', 'output'; accepted",
    ),
    "alpaca.txt": (json.dumps(ALPACA), r"line 1, item 1 of .*'instruction', 'input', 'output'"),
    "chat.jsonl": (
        json.dumps(CHAT[0]),
        "line 1 of .*has no \"text\", but 'messages'; accepted: an object with the whole",
    ),
    "tree.json": (
        json.dumps({"version": 1, "data": ROWS}, indent=1),
        "line 1 of .*has no \"text\", but 'version', 'data'",
    ),
    "null.jsonl": (f'{LINES}{{"text": null}}', 'line 26 of .*has a "text" that is no string'),
    "half.jsonl": (LINES + '{"text": "\\ud800"}', "line 26 of .*half a character"),
    "cut.jsonl": (LINES[:-5], r"line 25 of .*is no JSON \("),
    "deep.jsonl": (f'{{"text": {DEEP}', "line 1 of .*nested too deep"),
    "deep.txt": (f'{{"text": {DEEP}', "line 1 of .*nested too deep"),
    "digits.json": (f'[{{"text": "a"}}, {"9" * 10_000}]', r"is no JSON \("),
    "a.csv": ("text,label\n" + "hello,1\n" * 300, "is a table.*to_json.*accepted: a UTF-8 text, JSON objects"),
    "A.TSV": ("text\tlabel\n" + "hello\t1\n" * 300, "is a table"),
    "a.parquet": ("PAR1", "is a table"),
    "nul.txt": ("a\0b\n" * 300, "holds NUL characters"),
    "space.txt": (" \r\n\t" * 3000, "holds no text"),
    "nothing.txt": ("", "holds no text"),
    "nothing.jsonl": ('{"text": " "}\n' * 30, "holds no text"),
    "one.jsonl": ('{"text": "a"}\n{"text": ""}', "holds a single document"),
    "same.jsonl": ('{"text": "a"}\n' * 30, "holds one document again and again"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_neither_text_nor_documents_is_one_line(name):
    content, expected = REFUSED[name]
    for packed in (False, True):
        with pytest.raises(InputError, match=expected) as raised:
            written(name + ".gz" * packed, gzip.compress(content.encode()) if packed else content.encode())
        assert str(raised.value).startswith("data.path: ") and "\n" not in str(raised.value)


def test_places_that_hold_no_text_are_one_line(tmp_path):
    packed = gzip.compress(os.urandom(10_000))
    (tmp_path / "broken.gz").write_bytes(packed[:100] + b"\0" * 1000 + packed[1100:])
    for path, expected in {
        str(tmp_path): "is no regular file; accepted",
        os.devnull: "is no regular file; accepted",
        str(tmp_path / "broken.gz"): "cannot be read",
        "~a user that nobody is/a.txt": "does not exist; accepted",
        "x" * 5000: "does not exist; accepted",
        "a\0b": "does not exist; accepted",
        "": "is no regular file",
    }.items():
        with pytest.raises(InputError, match=expected) as raised:
            data.read(path)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 700


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="is no regular file; accepted"):
        data.read(str(tmp_path / "fifo"))


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="others do not limit a process's memory")
def test_an_archive_that_unpacks_to_more_than_the_memory_is_one_line(tmp_path):
    """A small archive that unpacks to gigabytes, with memory for only one of them."""
    import resource  # which Windows lacks

    (tmp_path / "bomb.txt").write_bytes(gzip.compress(b"a line of it\n" * 2**22) * 80)
    allowed = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**30, allowed[1]))
    try:
        with pytest.raises(
            InputError, match=r"bomb\.txt' takes, unpacked, more than a quarter of the free memory.*accepted"
        ):
            data.read(str(tmp_path / "bomb.txt"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, allowed)


def test_a_line_of_ten_megabytes(tokenizer):
    text = written("a.txt", b"words " * 1_700_000)
    assert max(map(len, text.train)) == data.PIECE and written(
        "a.jsonl", b'{"text": "%s"}\n{"text": "b"}' % (b"a" * 10**7)
    )
    assert data.held_out(text, tokenizer, 4096, 64, 100).shape == (2, 64)


def tokenizer_of(model: BPE | WordLevel, **marks: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


NOTHING = {
    "no token": (tokenizer_of(BPE({"z": 0}, [])), "knows no token of the text, such as 'In the"),
    "an unknown one": (tokenizer_of(WordLevel({"?": 0}, "?"), unk_token="?"), "knows no token of the"),
    "an error": (tokenizer_of(WordLevel({"z": 0}, "?")), "cannot encode the text: "),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_tokenizer_that_makes_nothing_of_the_text(case):
    tokenizer, expected = NOTHING[case]
    for make in (data.windows, data.examples):
        with pytest.raises(InputError, match=rf"model\.path: its tokenizer {expected}") as raised:
            make(["In the beginning was the word. " * 20] * 10, tokenizer, 100, 8, 4, seed=0)
        assert "\n" not in str(raised.value)


def test_special_tokens_beyond_the_vocabulary():
    """Special tokens count too: a window begins with one and a document ends with one."""
    for marks, makers in {"bos_token": (data.windows, data.examples), "eos_token": (data.examples,)}.items():
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
        tokenizer.add_special_tokens({marks: "<new>"})
        for make in makers:
            with pytest.raises(InputError, match="its tokenizer makes token 4096, but the model knows 4096 tokens"):
                make(["In the beginning was the word. " * 20] * 10, tokenizer, 4096, 8, 4, seed=0)


@given(
    st.lists(st.sampled_from(["<s>a", "a b", "b</s>", "<s>", "</s>a", "a"]), min_size=1, max_size=40),
    st.integers(2, 7),
    st.sampled_from([{"bos_token": "<s>", "eos_token": "</s>"}, {"bos_token": "<s>", "eos_token": "<s>"}]),
)
def test_no_beginning_of_text_follows_another(words, seq, marks):
    """Whether or not the text already has it; and no other token is added."""
    tokenizer = tokenizer_of(WordLevel({"a": 0, "b": 1, "<s>": 3, "</s>": 4}, "<s>"), **marks)
    tokenizer.backend_tokenizer.add_special_tokens(["<s>", "</s>"])
    pieces = [f"{word} a" for word in words]
    plain = [
        t for i in data.np.random.default_rng(0).permutation(len(pieces)) for t in tokenizer(pieces[i])["input_ids"]
    ]
    assert [t for part in data._split_tokens(plain, 3, seq) for t in part if t != 3] == [t for t in plain if t != 3]
    try:
        parts = [*data.windows(pieces, tokenizer, 6, seq, 1000, 0), *data.examples(pieces, tokenizer, 6, seq, 1000, 0)]
    except InputError as error:
        assert "less than one window" in str(error)
        return
    for part in parts:
        assert part[0] == 3 and not ((part[:-1] == 3) & (part[1:] == 3)).any()


def test_the_split_is_in_the_result(tiny_llama, tmp_path, capsys):
    """Of 12 documents four are empty and one is repeated; the result has the counts of both parts."""
    rows = [f"Document {i} is about the number {i}. " * 20 * (i % 3 > 0) for i in (*range(11), 10)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": row} for row in rows]))
    settings = Settings(
        formats.get("int8", block=64),
        ModelSettings(str(tiny_llama), "float32"),
        DataSettings(str(tmp_path / "a.json"), seq=32),
        TuneSettings(steps=2, batch=2, rank=2),
        EvalSettings(tokens=10**6),
        device="cpu",
    )
    metrics = run(settings, tmp_path / "run")["metrics"]
    said = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(r"qbench: eval\.tokens: 1000000 are more than the \d+ held out; all of these are scored", said)
    assert metrics["data"] == {
        "unit": "documents", "held_out": 1, "train": 6, "empty": 4, "repeated": 1, "examples": 4
    }  # fmt: skip
    assert metrics["quality"]["baseline"]["tokens"] < 1000


def test_more_tokens_than_there_are_is_told_at_once(tokenizer):
    text, began = data.read("docs"), time.monotonic()
    with pytest.warns(
        UserWarning, match="qbench: eval.tokens: 99999999999 are more than the 9690 held out; all of these"
    ):
        windows = data.held_out(text, tokenizer, 4096, 256, 99999999999)
    assert windows.shape == (38, 256) and time.monotonic() - began < 10
    with warnings.catch_warnings(action="error"):
        assert (data.held_out(text, tokenizer, 4096, 256, 9690) == windows).all()
        assert data.held_out(text, tokenizer, 4096, 256, 256).shape == (2, 256), "whole windows"


def test_paragraphs_are_the_documents_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\nof it\n \n" for i in range(400)))
    documents = data.read(str(tmp_path / "a.txt")).documents()
    whole = [d for d in documents if d.startswith("line") and d.endswith("of it")]
    assert len(documents) > 300 and len(whole) > 0.8 * len(documents), "a cut between pieces may part one"


def test_examples(tmp_path, tokenizer):
    """Every token of a document is in examples of at most seq tokens; each has a start token, the last an end token."""
    long = " ".join(f"word{i}" for i in range(100))
    text = jsonl(tmp_path / "a.jsonl", ["short", long, "", "a"])
    examples = data.examples(text.documents(), tokenizer, 4096, 64, 100, seed=0)
    assert all(len(e) <= 64 and e[0] == tokenizer.bos_token_id for e in examples)
    parts = [e for e in examples if len(e) > 10]
    assert tokenizer.decode(torch.cat([e[1:] for e in parts])[:-1]) == long
    assert {int(e[-1]) for e in examples if len(e) < 64} == {tokenizer.eos_token_id}
    assert len(data.examples(text.documents(), tokenizer, 4096, 64, 2, seed=0)) == 2
    with pytest.raises(InputError, match="knows 100 tokens"):
        data.examples(text.documents(), tokenizer, 100, 64, 4, seed=0)
    with pytest.raises(InputError, match="no document"):
        data.examples([], tokenizer, 4096, 64, 4, seed=0)
