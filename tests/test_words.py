"""Names say what a thing is, and a sentence of a docstring is short enough to be read once."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    file for top in ("formats", "qbench", "experiments", "docs", "tests") for file in (ROOT / top).rglob("*.py")
)
#: say nothing of what a thing is
EMPTY = re.compile(r"(told|found|one|some|what)(_\w+)?")
LONGEST = 30  #: words of a sentence


def names(tree: ast.AST) -> Iterator[str]:
    """The names that a module gives to variables, arguments, functions, classes, attributes and imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname


def sentences(docstring: str) -> Iterator[str]:
    """The sentences of a docstring. Code, tables and the items of a list are not part of one."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        if len(lines) > 1 and all(line.startswith("    ") for line in lines if line.strip()):
            continue  # code or a table
        text = re.sub(r"`[^`]*`", "code", " ".join(line.strip() for line in lines))
        yield from re.split(r"(?<=[.!?:])\s+", text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_names_say_something(file):
    empty = sorted({name for name in names(ast.parse(file.read_text("utf-8"))) if EMPTY.fullmatch(name)})
    assert not empty, f"{file}: {', '.join(empty)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_sentences_are_short(file):
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for sentence in sentences(ast.get_docstring(node) or ""):
                words = [word for word in sentence.split() if re.search(r"\w", word)]
                assert len(words) <= LONGEST, f"{file}: {len(words)} words: {sentence}"
