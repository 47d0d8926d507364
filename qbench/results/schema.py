"""What a result.json must be, as result.schema.json says it: the types of docs/result.md, in JSON Schema.

A key that the schema does not name may hold anything.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from qbench.system.messages import visible

FILE = Path(__file__).with_name("result.schema.json")
DEEPEST = 40  #: objects and lists within each other; a result has nine, and Python's own recursion ends at a thousand


def problem(result: Any) -> str | None:
    """Why something is no result, in words that name the key; None if it is one."""
    return f"it is nested more than {DEEPEST} deep" if _deeper(result, DEEPEST) else _refused(result, "result")


def lacking(result: dict) -> str | None:
    """What a result lacks to be shown and compared, in words that name the key; None if it has all. The lists in its
    metrics may be arrays."""
    return _refused(result, "comparable")


def _refused(result: Any, what: str) -> str | None:
    from fastjsonschema import JsonSchemaValueException  # not above: who reads no results does without

    try:
        _checks(what)(result)
    except JsonSchemaValueException as error:
        return visible(re.sub(r"^data(\.| )", lambda of: "" if of[1] == "." else "it ", error.message), 300)
    return None


@lru_cache
def _checks(what: str) -> Callable[[Any], Any]:
    import fastjsonschema

    whole = json.loads(FILE.read_text("utf-8"))
    part = whole if what == "result" else {**whole["definitions"][what], "definitions": whole["definitions"]}
    return fastjsonschema.compile(part)


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(item, levels - 1) for item in items if isinstance(item, dict | list))
