"""The names of formats, read from source and metadata. `formats.names()` imports PyTorch, which takes seconds."""

import ast
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path


@cache
def format_names() -> tuple[str, ...]:
    """Every name that +format= accepts except `custom`, sorted. Names that a plugin registers on import are missing."""
    spec = find_spec("formats")
    folders = spec.submodule_search_locations or [] if spec else []
    names = {point.name for point in entry_points(group="qbench.formats")}
    for folder in folders:
        for file in Path(folder).glob("*.py"):
            names.update(_registered(file.read_text("utf-8")))
    return tuple(sorted(names))


def _registered(source: str) -> list[str]:
    """The names in the decorators `@register("name", …)` of a module."""
    if "@register(" not in source:
        return []
    calls = [
        decorator
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "register"
    ]
    return [str(argument.value) for call in calls for argument in call.args if isinstance(argument, ast.Constant)]
