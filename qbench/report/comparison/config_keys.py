"""The keys of configs: which of them differ between runs, and what reports call them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qbench.report.wording import UNTUNED, init_name, method_name, shorten
from qbench.settings import LOW_RANK

SETTING = ("model", "data", "eval", "device")  #: the parts of a config that compared runs share
AFTERWARDS = ("merge", "adapter_format", "adapter_block")  #: `tune` keys that take effect after training


def fingerprint(config: dict, *parts: str) -> str:
    """These parts of a config as a text. Equal texts mean equal parts."""
    return json.dumps([config.get(part) for part in parts], sort_keys=True)


def varying_keys(configs: Sequence[dict], parts: Iterable[str]) -> list[str]:
    """The keys within `parts` that are not the same in all configs, as `tune.lr`; `tune.method` first.

    Configs without a fine-tune lack all other `tune` keys, so they count only for `tune.method`.
    """
    flats = [_flatten(config, parts) for config in configs]
    tuned = [flat for flat in flats if flat.get("tune.method") != UNTUNED]
    varying = []
    for key in {key for flat in flats for key in flat}:
        values = {json.dumps(flat.get(key)) for flat in (flats if key == "tune.method" else tuned)}
        if len(values) > 1:
            varying.append(key)
    return sorted(varying, key=lambda key: (key != "tune.method", key))


def describe_keys(config: dict, keys: Iterable[str]) -> list[str]:
    """The values of these keys in words, such as `rank 16` or `LoftQ`."""
    flat = _flatten(config, (*SETTING, "tune"))
    packed, init = flat.get("tune.adapter_format"), flat.get("tune.init", "")
    names = {
        "eval.tasks": f"tasks {', '.join(config['eval'].get('tasks', []))}",
        "tune.method": method_name(config["tune"]),
        "tune.init": init_name(init) if config["tune"]["method"] in LOW_RANK else "",
        "tune.merge": "merged" if flat.get("tune.merge") else "",
        "tune.adapter_format": f"adapters in {packed}" if packed else "",
    }
    texts = []
    for key in keys:
        if key in flat:
            value = f"{flat[key]:g}" if isinstance(flat[key], float) else flat[key]
            texts.append(names.get(key, f"{key.removeprefix('tune.')} {value}"))
    return [shorten(text) for text in texts if text]


def describe_setting(config: dict, varying: Iterable[str]) -> str:
    """The model and the text, and the varying keys that set it apart from other settings."""
    paths = config["model"].get("path") or "the bundled model", config["data"]["path"]
    names = " on ".join(shorten(Path(path).name) for path in paths)
    return ", ".join([names, *describe_keys(config, [key for key in varying if not key.endswith(".path")])])


def _flatten(config: dict, parts: Iterable[str]) -> dict[str, Any]:
    """`{"tune": {"lr": 1}}` as `{"tune.lr": 1}`, for these parts."""
    flat: dict[str, Any] = {}
    for part in parts:
        value = config.get(part)
        flat |= {f"{part}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {part: value}
    return flat
