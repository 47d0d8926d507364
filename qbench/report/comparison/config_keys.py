"""The keys of configurations: which of them tell runs apart, and what these are called."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qbench.report.wording import UNTUNED, method, short, start
from qbench.settings import LOW_RANK, TuneSettings

WHERE = ("model", "data", "eval", "device")  #: the parts that runs to be compared have in common
AFTERWARDS = ("merge", "adapter_format", "adapter_block")  #: what is measured of adapters once they are trained


def completed(config: dict) -> dict:
    """What decided a run: with the defaults of what a fine-tune could not yet be told then, without what is said of where
    a format comes from."""
    tune = config["tune"]
    if tune.get("method") != UNTUNED:
        tune = asdict(TuneSettings()) | tune
    return {**config, "tune": tune, "format": {k: v for k, v in config["format"].items() if k != "source"}}


def text(config: dict, *keys: str) -> str:
    """Those parts of a config, to be compared."""
    return json.dumps([config.get(key) for key in keys], sort_keys=True)


def _flat(config: dict, parts: Iterable[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for part in parts:
        value = config.get(part)
        flat |= {f"{part}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {part: value}
    return flat


def varied_in(configs: Sequence[dict], parts: Iterable[str]) -> list[str]:
    """The keys in those parts of the configs that are not the same in all; a method of fine-tuning first."""
    flats = [_flat(config, parts) for config in configs]
    tuned = [flat for flat in flats if flat.get("tune.method") != UNTUNED]  # which has no other keys
    found = []
    for key in {key for flat in flats for key in flat}:
        values = {json.dumps(flat.get(key)) for flat in (flats if key == "tune.method" else tuned)}
        found += [key] if len(values) > 1 else []
    return sorted(found, key=lambda key: (key != "tune.method", key))


def told(config: dict, keys: Iterable[str]) -> list[str]:
    """What a config has for those keys, in words."""
    flat = _flat(config, (*WHERE, "tune"))
    values = {key: f"{flat[key]:g}" if isinstance(flat[key], float) else flat[key] for key in keys if key in flat}
    packed, init = flat.get("tune.adapter_format"), flat.get("tune.init", "")
    names = {
        "eval.tasks": f"tasks {', '.join(config['eval'].get('tasks', []))}",
        "tune.method": method(config["tune"]),
        "tune.init": start(init) if config["tune"]["method"] in LOW_RANK else "",
        "tune.merge": "merged" if flat.get("tune.merge") else "",
        "tune.adapter_format": f"adapters in {packed}" if packed else "",
    }
    told = (names.get(key, f"{key.removeprefix('tune.')} {value}") for key, value in values.items())
    return [short(text) for text in told if text]


def name(config: dict, varied: Iterable[str]) -> str:
    """A setting's: the model and the text, and what else tells it from the others."""
    paths = config["model"].get("path") or "the bundled model", config["data"]["path"]
    names = " on ".join(short(Path(path).name) for path in paths)
    return ", ".join([names, *told(config, [key for key in varied if not key.endswith(".path")])])
