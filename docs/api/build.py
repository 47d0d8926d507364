"""Build the API reference from docstrings and `#:` comments: `python docs/api/build.py FOLDER`."""

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
    """Every module except `__main__`, each package before its modules."""
    for package in PACKAGES:
        yield package.__name__
        inside = walk_packages(package.__path__, f"{package.__name__}.")
        yield from (module.name for module in inside if not module.name.endswith("__main__"))


_parse = doc_ast._parse


def _with_comments(source: str) -> ast.Module:
    """Parse a source, and make each `#:` comment the docstring of its variable, where pdoc looks for it."""
    tree, lines = _parse(source), source.splitlines()
    for place in ast.walk(tree):
        if isinstance(place, ast.Module | ast.ClassDef):
            place.body = [part for statement in place.body for part in (statement, *_comment(statement, lines))]
    return tree


def _comment(statement: ast.stmt, lines: list[str]) -> list[ast.Expr]:
    """Returns the `#:` comment at the end of an assignment, or in the lines before it."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        return []
    _, behind, comment = lines[statement.end_lineno - 1].partition("  #: ")
    before = takewhile(lambda line: line.startswith("#: "), map(str.strip, lines[statement.lineno - 2 :: -1]))
    comment = comment if behind else " ".join(line.removeprefix("#: ") for line in reversed(list(before)))
    return [ast.Expr(ast.Constant(comment))] if comment else []


def build(folder: Path) -> list[str]:
    """Write a page per module, an index and the data of its search. Returns the modules' names."""
    with patch.object(doc_ast, "_parse", _with_comments):
        return _build(folder)


def _build(folder: Path) -> list[str]:
    docs = {name: Module(import_module(name)) for name in modules()}
    for name in qbench.__all__:  # they are imported on first use, and pdoc knows them only then
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
