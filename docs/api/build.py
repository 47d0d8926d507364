"""The API docs, from docstrings and `#:` comments: `python docs/api/build.py FOLDER`."""

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from pkgutil import walk_packages
from unittest.mock import patch

from pdoc import doc_ast, render
from pdoc.doc import Module

import formats
import qbench

PACKAGES = (qbench, formats)


def modules() -> Iterator[str]:
    """Every module but what runs as a command, a package before what is in it."""
    for package in PACKAGES:
        yield package.__name__
        inside = walk_packages(package.__path__, f"{package.__name__}.")
        yield from (module.name for module in inside if not module.name.endswith("__main__"))


_parse = doc_ast._parse


def _with_comments(source: str) -> ast.Module:
    """The tree of a source in which what a `#:` comment says of a variable is the docstring that pdoc looks for."""
    tree, lines = _parse(source), source.splitlines()
    for place in ast.walk(tree):
        if isinstance(place, ast.Module | ast.ClassDef):
            place.body = [part for statement in place.body for part in (statement, *_comment(statement, lines))]
    return tree


def _comment(statement: ast.stmt, lines: list[str]) -> list[ast.Expr]:
    """What is said of a variable in the line where it ends, or else in those before it."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        return []
    _, behind, comment = lines[statement.end_lineno - 1].partition("  #: ")
    before = takewhile(lambda line: line.startswith("#: "), map(str.strip, lines[statement.lineno - 2 :: -1]))
    comment = comment if behind else " ".join(line.removeprefix("#: ") for line in reversed(list(before)))
    return [ast.Expr(ast.Constant(comment))] if comment else []


def build(folder: Path) -> list[str]:
    """Write a page a module, an index and what its search needs. Returns the modules."""
    with patch.object(doc_ast, "_parse", _with_comments):
        return _build(folder)


def _build(folder: Path) -> list[str]:
    docs = {name: Module(import_module(name)) for name in modules()}
    for name in qbench.__all__:  # which are imported once they are asked for, and only then known to pdoc
        getattr(qbench, name)
    render.configure(template_directory=Path(__file__).parent, footer_text=f"qbench {qbench.__version__}")
    pages = {f"{name.replace('.', '/')}.html": render.html_module(module, docs) for name, module in docs.items()}
    for name, text in {
        "index.html": render.html_index(docs),
        "search.js": render.search_index(docs),
        **pages,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return list(docs)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(f"{len(build(target))} modules, from {target / 'index.html'}")
