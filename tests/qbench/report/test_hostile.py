"""No file breaks a report: one that is not a result is skipped and named, and texts in results are never markup."""

import gzip
import html.parser
import io
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from urllib.parse import unquote_to_bytes
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from matplotlib.text import Text
from rich.console import Console

import qbench
from qbench.cli.report import main
from qbench.errors import InputError
from qbench.report.comparison import charts, findings, page
from qbench.report.run import page as run_page
from qbench.report.run import terminal
from qbench.results import dataframe, json_files, schema, store
from qbench.system.messages import sanitize, sanitize_all
from tests.qbench.sample_results import browsed, only, whole

GOOD = [("none", 0, 0.0), ("nf4", 0, 0.02), ("nf4", 1, 0.03), ("int8", 0, 0.001)]
TEXTS = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</td></table><h1>x", "&lt;b&gt;", "{{ 7 * 7 }}",
    "a | b | c", "[x](javascript:alert(1))", "![x](http://host/x.png)", "<http://host>", "`a` **b** _c_ ~~d~~", "# head",
    "1. one", "- item", "> quote", "---", "```", "\\", "$\\frac{$", "$x$ and $$y$$", "x_1^{2", "[red]x[/red]", "[/]",
    ":smile:", "\x1b[31mred\x1b]0;title\x07", "\x9b31m", "a\nb\r\nc\td", "\x00", "\u202eabc\u2066", "\u200b", "\ud800",
    "\udcff", "\u0301" * 50, "../../etc/passwd", "/", "..", "%s %n {0} {x.__class__}", "", " ", "'; drop table", "=1+1",
    "a" * 100_000, "名前 🙂", "nan", "none",
]  # fmt: skip
TOKEN = "\ue000"  # marks JSON that json.dumps cannot write
RAW = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "[" * 100_000,
    "[" * 100 + "]" * 100,
    "01",
    "'x'",
]
NUMBERS = [None, True, False, -1, 0, 1, 2.5, 64.0, 1e304, -1e304, 5e-324, 2**63, -(2**70), 1e15]
OTHERS = [[], {}, [[]], [1, [2]], [None], [True], [1.0] * 3, {"a": 1}, {"a": {"b": []}}, [{"a": 1}, {"b": 2}], ["x"]]
VALUES = [*TEXTS, *NUMBERS, *OTHERS, *(f"{TOKEN}{raw}{TOKEN}" for raw in RAW)]


def containers(value: object) -> Iterator[dict | list]:
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value[:3]:
            yield from containers(item)


def mutate(result: dict, random: Random) -> None:
    """Change one thing: a value, a key, the length of a list."""
    holder = random.choice([item for item in containers(result) if item])
    at = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    kind = random.randrange(10)
    if kind < 6:
        holder[at] = random.choice(VALUES)
    elif kind < 8:
        del holder[at]
    elif isinstance(holder, list):
        holder[:] = random.choice([holder[:1], holder * 2, [*holder, random.choice(VALUES)], holder + holder[:1]])
    elif kind == 8:
        holder[random.choice(TEXTS)] = holder.pop(at)
    else:
        holder[random.choice([*TEXTS, "path", "block", "windows"])] = random.choice(VALUES)


def written(result: dict) -> bytes:
    text = json.dumps(json_files._replace_non_finite(result))
    return re.sub(r'"\\ue000(.*?)\\ue000"', lambda of: of[1], text).encode()


def spoilt(content: bytes, random: Random) -> bytes:
    """The content as a full disk, an editor or a broken transfer might leave it."""
    at = random.randrange(len(content))
    return random.choice(
        [
            b"", content[:at], content[:at] + random.randbytes(8) + content[at:], content[:at] + b"\xff" + content[at:],
            gzip.compress(content), content.decode().encode("utf-16"), b"\xef\xbb\xbf" + content, content + content,
            b"[]", b"null", b'"text"', b"[" * 200_000, b'{"a":' * 200_000, b"\0" * 4096, b"<html></html>",
            content.replace(b"{", b"["),
        ]
    )  # fmt: skip


def spoil(folder: Path, random: Random) -> None:
    """Put something that is no readable file in the place of result.json."""
    file = folder / store.FILE
    kind = random.choice(["folder", "pipe", "socket", "gone", "loop", "huge", "zero"])
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(folder)  # because the path of a socket must be short
        try:
            socket.socket(socket.AF_UNIX).bind(store.FILE)
        finally:
            os.chdir(here)
    elif kind == "gone":
        file.symlink_to("nowhere")
    elif kind == "loop":
        file.symlink_to(store.FILE)
    elif kind == "huge":
        with file.open("wb") as sparse:
            sparse.truncate(5 << 30)
    else:
        file.symlink_to("/dev/zero")


def fill(folder: Path, count: int, seed: int = 0) -> None:
    """Write mutations of a good result, a folder each. An eighth of the folders have odd names."""
    for i in range(count):
        random = Random(f"{seed} {i}")
        name = f"{i}"
        if random.random() < 0.125:
            name += random.choice(TEXTS).replace("/", "").replace("\0", "")[:50]
        here = folder / os.fsdecode(name.encode("utf-8", "replace" if "\ud800" in name else "surrogateescape"))
        here.mkdir(parents=True)
        result = json.loads(json.dumps(json_files._replace_non_finite(whole("nf4", 100 + i, 0.02))))
        if random.random() < 0.2:
            result |= {"status": "failed", "error": {"type": "KeyError", "message": "gone", "traceback": ""}}
        kind = random.random()
        if kind < 0.1 and sys.platform != "win32":
            spoil(here, random)
        elif kind < 0.2:
            (here / store.FILE).write_bytes(spoilt(written(result), random))
        else:
            for _ in range(random.choice([1, 1, 1, 2, 5])):
                mutate(result, random)
            (here / store.FILE).write_bytes(written(result))


@pytest.fixture
def good(tmp_path) -> Path:
    for name, seed, shift in GOOD:
        store.write(tmp_path / "runs" / "good" / f"{name}{seed}", whole(name, seed, shift))
    return tmp_path / "runs"


def report(folder: Path, monkeypatch, capsys) -> tuple[str, str]:
    """Run the command, and check its page and Markdown. Returns standard output and standard error."""
    monkeypatch.setattr("sys.argv", ["qbench.report", str(folder), "--out", str(folder.parent / "report")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main() == 0
    output = capsys.readouterr()
    for text in output:
        assert [c for c in text if c != "\n" and not c.isprintable()] == []
    whole_page(folder.parent / "report" / page.HTML)
    whole_twin(folder.parent / "report" / page.MARKDOWN)
    for file in (folder.parent / "report" / "figures").iterdir():
        ElementTree.parse(file)
    return output.out, output.err


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {f"{tag} {name}" for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]


def whole_page(file: Path) -> None:
    text = file.read_text("utf-8")
    seen = Tags(text)
    assert seen.tags["script"] == seen.tags["h1"] == 1 and not seen.tags.keys() & {"b", "iframe", "object"}
    assert not [name for name in seen.attributes if name.partition(" ")[2].startswith("on")]
    assert seen.tags["img"] == text.count("<figure>")
    for link in seen.links:
        assert link.startswith(("data:image/svg+xml;base64,", "#s")) or exists(file.parent, link), link
    assert not [c for c in text if c != "\n" and not c.isprintable()]


def whole_twin(file: Path, fences: int = 0) -> None:
    """fences: the number of code blocks that the page has itself."""
    text = file.read_text("utf-8")
    assert not [c for c in text if c != "\n" and not c.isprintable()]
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    kinds = Counter(token.type for token in (*tokens, *inline))
    assert not kinds.keys() & {
        "html_block",
        "html_inline",
        "code_block",
        "blockquote_open",
        "hr",
        "em_open",
        "strong_open",
    }
    assert kinds["fence"] == fences
    assert sum(token.type == "heading_open" and token.tag == "h1" for token in tokens) == 1
    for token in inline:
        link = token.attrs.get("href") or token.attrs.get("src")
        assert link is None or exists(file.parent, str(link)), link
    columns = 0
    for line in text.splitlines():
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("| ") else 0
        assert not bars or columns in (0, bars), line
        columns = bars


def exists(folder: Path, link: str) -> bool:
    return os.path.lexists(os.fsencode(folder) + b"/" + unquote_to_bytes(link))


def part_of(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]


def hold(good: Path, count: int, monkeypatch, capsys, seed: int = 0) -> None:
    """Check that bad results are named and change nothing else, and that all other results are shown."""
    output, _ = report(good, monkeypatch, capsys)
    before = [(good.parent / "report" / name).read_text("utf-8") for name in (page.HTML, page.MARKDOWN)]
    fill(good / "bad", count, seed)
    collection = page.collect(good)
    files = {Path(folder) / store.FILE for folder in (good / "bad").iterdir()}
    refused, rest = files & collection.unreadable.keys(), files & collection.results.keys()
    assert refused | rest == files and len(refused) > count / 4 and len(rest) > count / 10
    for file in refused:
        assert sanitize(str(file)) in collection.unreadable[file] and collection.unreadable[file].isprintable()
    apart = good.parent / "apart"
    for file in rest:
        (apart / file.parent.name).parent.mkdir(exist_ok=True)
        shutil.move(file.parent, apart / file.parent.name)

    # bad results change only the list of skipped files
    now, err = report(good, monkeypatch, capsys)
    assert now == output and err.count("qbench: skipped") == min(len(refused), 21)
    after = [(good.parent / "report" / name).read_text("utf-8") for name in (page.HTML, page.MARKDOWN)]
    marks = ('<section id="skipped">', "</section>"), (f"\n## {len(refused)} skipped: ", "## How it was run")
    for first, second, (start, end) in zip(before, after, marks, strict=True):
        above, listing, below = re.split(f"({re.escape(start)}.*?)(?={end})", second, flags=re.S)
        assert listing.count(store.FILE) >= len(refused)
        shared = re.sub(r", \d+ files? skipped", "", above) + below.removeprefix("</section>")
        assert shared.split() == first.split()
    reasons = Tags(after[0]).tags["code"] - Tags(before[0]).tags["code"]
    assert reasons == len(refused)

    # qbench.load skips the same files
    with pytest.warns(UserWarning) as caught:
        frame = qbench.load(good)
    names = [str(warning.message) for warning in caught]
    unread = {file for file in refused if any(sanitize(str(file)) in name for name in names)}
    assert len(frame) == len(GOOD) + len(refused - unread)

    # mutations that are still results are shown, by the page and in the terminal
    for folder in apart.iterdir():
        result = store.read(folder)
        if result["status"] == "done":
            out = io.StringIO()
            terminal.show(result, folder, Console(file=out, width=80, force_terminal=True))
            terminal.show_line(result, True, Console(file=out, width=80, force_terminal=True))
            assert re.sub(r"\x1b\[\d+m", "", out.getvalue()).replace("\n", "").isprintable()
    store.write(apart / "none", whole("none"))
    report(apart, monkeypatch, capsys)


def test_bad_results_are_named_and_change_nothing(good, monkeypatch, capsys):
    hold(good, 40, monkeypatch, capsys)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_three_hundred_of_them(good, monkeypatch, capsys, seed):
    hold(good, 100, monkeypatch, capsys, seed)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such permissions")
def test_what_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for run in ("open", "closed/run", "secret"):
            store.write(folder / run, whole())
        assert len(qbench.load(folder)) == 3  # also imports everything, which needs its rights
        (folder / "closed").chmod(0)
        (folder / "secret" / store.FILE).chmod(0)
        folder.chmod(0o755)
        with nobody():
            results, unreadable = dataframe.read_results(folder)
            with pytest.warns(UserWarning, match="Permission denied"):
                assert len(qbench.load(folder)) == 1
        (folder / "closed").chmod(0o700)
    assert list(results) == [folder / "open" / store.FILE]
    assert unreadable == {
        place: f"{place} cannot be read: Permission denied"
        for place in (folder / "closed", folder / "secret" / store.FILE)
    }


@contextmanager
def nobody() -> Iterator[None]:
    """Run as a user without rights, because root may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_deep_folders_and_odd_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.write(tmp_path / "one", whole())
    for _ in range(1200):  # deeper than the recursion limit of Python
        os.mkdir("d")
        os.chdir("d")
    results, unreadable = dataframe.read_results(tmp_path)
    for _ in range(1200):
        os.chdir("..")
        os.rmdir("d")
    assert len(results) == 1 and all("File name too long" in reason for reason in unreadable.values())
    for path in ("nowhere", "no\x1bwhere"):
        with pytest.raises(
            InputError, match=r"does not exist; accepted: result\.json or results\.jsonl\.xz files, or folders"
        ) as error:
            qbench.load(path)
        assert str(error.value).isprintable()
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read" in dataframe.read_results(tmp_path / "loop")[1][tmp_path / "loop"]


def spoilt_leaves(value: object, place: tuple = ()) -> Iterator[tuple]:
    """The keys to every value that is not an object; of a list, only to its first item."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from spoilt_leaves(item, (*place, key))
    elif isinstance(value, list) and value:
        yield place
        yield from spoilt_leaves(value[0], (*place, 0))
    else:
        yield place


def test_every_key_has_a_type():
    result = json.loads(json.dumps(json_files._replace_non_finite(whole())))
    assert schema.why_invalid(result) is schema.why_incomparable(result) is None
    for place in spoilt_leaves(result):
        spoilt = json.loads(json.dumps(result))
        *above, last = place
        holder = spoilt
        for key in above:
            holder = holder[key]
        holder[last] = {"no": [True]}
        name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).removeprefix(".")
        assert name.removesuffix("[0]") in (schema.why_invalid(spoilt) or schema.why_incomparable(spoilt) or ""), name


@pytest.mark.thorough
def test_a_page_with_such_texts_is_whole(good, tmp_path, monkeypatch, capsys):
    """Each text stands in every place that takes any text. In a browser, nothing of it runs or loads."""
    for i, text in enumerate(TEXTS):
        result = json.loads(
            json.dumps(json_files._replace_non_finite(whole("nf4", 100 + i, 0.02))).replace("layers.0.q_proj", f"l.{i}")
        )
        text = text or "x"
        result["config"] |= {"format": {"name": text}, "device": text}
        if i % 8 == 0:
            result["config"]["model"]["path"] = result["config"]["data"]["path"] = text
        result["config"]["tune"] |= {"method": text, "init": text, "adapter_format": text}
        result["environment"] |= {"device": text, "versions": {text: text}, "commit": text}
        result["metrics"]["tasks"] = {
            stage: {text: scores["docs"]} for stage, scores in result["metrics"]["tasks"].items()
        }
        result["metrics"]["error"]["layers"][0]["name"] = text
        result["metrics"]["bits"]["left"] = {text: text}
        store.write(good / f"text{i}", result)
        failed = {"status": "failed", "error": {"type": text, "message": text, "traceback": text}}
        store.write(good / f"failed{i}", result | failed)
        if i % 5 == 0:
            run_page.write(good / f"text{i}", result)
            whole_twin(good / f"text{i}" / "report.md", fences=1)
    report(good, monkeypatch, capsys)
    collection = page.collect(good)
    assert not collection.unreadable and len(collection.unfinished) == len(TEXTS)
    assert browsed(tmp_path / "report" / page.HTML) == {"wrong": "", "asked": "0", "wide": "0"}


def test_windows_that_do_not_fit_are_not_compared():
    """One run has 11 windows and the others 12; another has a window that is not finite."""
    runs = [whole("none"), whole("nf4", 0, 0.02), whole("nf4", 1, 0.02), whole("int8", 0, 0.01), whole("int4", 0, 0.1)]
    for scores in runs[2]["metrics"]["quality"].values():
        del scores["windows"][-1]
    runs[3]["metrics"]["quality"]["quantized"]["windows"][0] = None
    setting = only(runs)
    compared = {c.title for c in setting.configurations if "quantized" in c.differences}
    assert compared == {"nf4, block 64", "int4, block 64"} and findings.describe_findings(setting)


def test_a_seed_that_diverged_is_told(tmp_path, monkeypatch, capsys):
    runs = [whole("none"), whole("nf4", 0, 0.02), whole("nf4", 1, 0.02), whole("int8", 0, 0.01)]
    for run in runs[2:]:
        run["metrics"]["quality"]["tuned"] |= {"nll": None, "perplexity": None, "stderr": None}
    for i, run in enumerate(runs):
        store.write(tmp_path / "runs" / str(i), run)
    output, _ = report(tmp_path / "runs", monkeypatch, capsys)
    assert re.search(r"\| nf4, block 64 \(2 seeds\) \|.* \| [\d.]+ \(1 diverged\) \|", output)
    assert re.search(r"\| int8, block 64 \|.* \| diverged \|", output)


def test_no_text_of_a_figure_is_a_formula_or_left_out():
    names = ["$x_{$ and $$y$$", "_x", "nf4"]
    runs = [whole("none"), *(sanitize_all(whole(name, 0, 0.02 * i)) for i, name in enumerate(names))]
    for rate in (0.003, 0.01):
        runs.append(whole("nf4", 0, rate))
        runs[-1]["config"]["tune"]["lr"] = rate
    with charts.draw_charts(only(runs)) as made:
        assert {"pairs", "layers", "throughput", "learning_rates"} <= {chart.name for chart in made}
        for chart in made:
            chart.figure.canvas.draw()
            texts = [text.get_text() for text in chart.figure.findobj(Text)]
            assert not [text for text in texts if "mathdefault" in text], chart.name
            if chart.name == "throughput":
                assert all(any(name in text for text in texts) for name in names)
