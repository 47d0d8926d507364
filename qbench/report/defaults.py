"""Fills in the fine-tune keys that older results lack, with the defaults of that time."""

from dataclasses import asdict

from qbench.report.wording import UNTUNED
from qbench.settings import TuneSettings


def fill_defaults(config: dict) -> dict:
    """Fill in defaults for `tune` keys added since, and drop `format.source`: a citation has no effect on a run."""
    tune = config["tune"]
    if tune.get("method") != UNTUNED:
        tune = asdict(TuneSettings()) | tune
    return {**config, "tune": tune, "format": {k: v for k, v in config["format"].items() if k != "source"}}
