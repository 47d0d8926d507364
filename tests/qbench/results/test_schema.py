"""docs/result.md and the schema say the same, and all results there are pass it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbench.results import dataframe, schema, store
from tests.qbench.sample_results import whole

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads(schema.FILE.read_text("utf-8"))
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "result.md").read_text("utf-8"), flags=re.M)
#: what stands in code there and is no key of a result's: values, keys of the command line, files
WORDS = {
    "null",
    "auto",
    "default",
    "documents",
    "pieces",
    "lm_eval",
    "steps",
    "batch",
    "rss",
    "allocated",
    "reserved",
    "quality",
    "path",
}


def keys(part: dict) -> Iterator[str]:
    """All that a part of the schema names, however deep."""
    part = SCHEMA["definitions"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
    for name, inner in part.get("properties", {}).items():
        yield name
        yield from keys(inner)
    for inner in (*part.get("allOf", ()), *(part[of] for of in ("items", "additionalProperties") if of in part)):
        yield from keys(inner)


def at(place: str) -> dict:
    part = SCHEMA
    for name in place.split("."):
        part = SCHEMA["definitions"]["config"] if name == "config" else part["properties"][name]
    return part


@pytest.mark.parametrize("section", SECTIONS, ids=[section.partition("\n")[0] for section in SECTIONS])
def test_every_key_of_the_docs_has_a_type(section):
    """Those of a table's first column, where the section has one."""
    place, _, body = section.partition("\n")
    if place.startswith("#"):
        place, known = (
            "the head",
            {*SCHEMA["properties"], *keys(SCHEMA["properties"]["error"]), "running", "done", "failed", "oom"},
        )
    else:
        known = set(keys(at(place))) | {"against_baseline"}
    heads = re.findall(r"^\| (`.*?) \|", body, re.M) or [re.sub(r"```.*?```", "", body, flags=re.S)]
    named = {name for head in heads for name in re.findall(r"`([a-z0-9_]+)`", head)}
    assert named and named <= known | WORDS, f"{place}: add {named - known - WORDS} to {schema.FILE.name}"


def test_the_results_that_are_kept_pass():
    results, unreadable = dataframe.read_results(ROOT / "reports")
    assert len(results) > 100 and not unreadable
    assert {schema.why_incomparable(result) for result in results.values()} == {None}


@pytest.mark.parametrize("raised", [MemoryError("none left"), KeyError("gone"), KeyboardInterrupt()])
def test_what_a_run_leaves_that_ends_early_passes(raised, tmp_path):
    result = store.new_result({"anything": [1, {"a": None}]})
    result["metrics"] = {"memory": {"peak_bytes": {}}, "throughput": {}, "quality": {}}
    with pytest.raises(type(raised)), store.record_failure(tmp_path, result):
        raise raised
    assert store.read(tmp_path)["error"]["type"] == type(raised).__name__


def test_a_key_that_the_schema_does_not_name_may_hold_anything(tmp_path):
    result = whole() | {"later": [1, "a", {"b": None}], "path": {"x": 1}}
    result["metrics"] |= {"later": {"c": [[1], []]}}
    result["config"]["tune"] |= {"later": [1, 2]}
    store.write(tmp_path, result)
    assert store.read(tmp_path)["later"] == [1, "a", {"b": None}]
    frame = dataframe.load(tmp_path)
    assert frame["path"].tolist() == [str(tmp_path)]
