"""Check a result against result.schema.json, which states the types of docs/result.md in JSON Schema.

A key that the schema does not name may hold anything.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from qbench.system.messages import sanitize

FILE = Path(__file__).with_name("result.schema.json")
DEEPEST = 40  #: levels of objects and lists. A result has nine; Python's recursion ends at a thousand


def why_invalid(result: Any) -> str | None:
    """Says why `result` is not a valid result, naming the key; None if it is valid."""
    return (
        f"it is nested more than {DEEPEST} deep" if _is_deeper(result, DEEPEST) else _first_violation(result, "result")
    )


def why_incomparable(result: dict) -> str | None:
    """Says which key a result lacks to be shown and compared; None if it has all. Lists in its metrics may be arrays."""
    return _first_violation(result, "comparable")


def _first_violation(result: Any, definition: str) -> str | None:
    from fastjsonschema import JsonSchemaValueException  # imported late, because most commands read no results

    try:
        _compiled(definition)(result)
    except JsonSchemaValueException as error:
        return sanitize(re.sub(r"^data(\.| )", lambda match: "" if match[1] == "." else "it ", error.message), 300)
    return None


@lru_cache
def _compiled(definition: str) -> Callable[[Any], Any]:
    import fastjsonschema

    whole = json.loads(FILE.read_text("utf-8"))
    definitions = whole["definitions"]
    part = whole if definition == "result" else {**definitions[definition], "definitions": definitions}
    return fastjsonschema.compile(part)


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in items if isinstance(item, dict | list))
