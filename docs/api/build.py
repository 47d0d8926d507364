"""The API docs, from the docstrings: `python docs/api/build.py FOLDER`."""

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import walk_packages

from pdoc import render
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


def build(folder: Path) -> list[str]:
    """Write a page a module, an index and what its search needs. Returns the modules."""
    found = {name: Module(import_module(name)) for name in modules()}
    for name in qbench.__all__:  # which are imported once they are asked for, and only then known to pdoc
        getattr(qbench, name)
    render.configure(template_directory=Path(__file__).parent, footer_text=f"qbench {version('qbench')}")
    pages = {f"{name.replace('.', '/')}.html": render.html_module(module, found) for name, module in found.items()}
    for name, text in {
        "index.html": render.html_index(found),
        "search.js": render.search_index(found),
        **pages,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return list(found)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(f"{len(build(target))} modules, from {target / 'index.html'}")
