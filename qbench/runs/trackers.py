"""Send the losses and metrics of a run to TensorBoard, MLflow or Weights & Biases too, through accelerate.

By default they write into the folder of the run and send nothing over the network. Their own environment variables
change that: MLFLOW_TRACKING_URI, WANDB_MODE, WANDB_DIR.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from numbers import Number
from pathlib import Path
from typing import Any

from qbench import keys
from qbench.errors import InputError
from qbench.system.extras import install_command

NAMES = keys.TRACKERS
PROJECT = "qbench"


def checked(names: object) -> tuple[str, ...]:
    """Returns the trackers in the key `track`. Raises InputError if one is unknown or not installed."""
    keys.RUN["track"].check("track", names)
    checked_names = (names,) if isinstance(names, str) else tuple(names or ())  # type: ignore[arg-type]
    for name in checked_names:
        if find_spec(name) is None:
            raise InputError(f"track: {name} is not installed; {install_command(name)} brings it")
    return checked_names


class Tracks:
    """Passes a run on to its trackers: the loss of each step, and at the end every number of the result."""

    def __init__(self, accelerator: Any = None):
        self._accelerator = accelerator

    def step(self, step: int, **values: float) -> None:
        """Log the numbers of one step of the fine-tune. Steps count from 1."""
        if self._accelerator:
            self._accelerator.log({f"tune/{name}": value for name, value in values.items()}, step=step)

    def result(self, metrics: dict, step: int) -> None:
        """Log every number of a result's metrics, under its path such as `quality/tuned/perplexity`."""
        if self._accelerator:
            import pandas  # seconds to import

            flat = pandas.json_normalize(metrics, sep="/").iloc[0].to_dict()
            numbers = {k: v for k, v in flat.items() if isinstance(v, Number) and not isinstance(v, bool)}
            numbers = {
                re.sub(r"[^\w/. -]", "-", k): v for k, v in numbers.items()
            }  # the characters that MLflow accepts
            self._accelerator.log(numbers, step=step)


@contextmanager
def open_trackers(names: Sequence[str], folder: Path, config: dict) -> Iterator[Tracks]:
    """Start the trackers with the configuration of the run, and close them at the end, also after an exception."""
    if not names:
        yield Tracks()
        return
    import pandas
    from accelerate import Accelerator

    settings = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    settings |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder.absolute() / 'mlflow.db'}"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update({name: value for name, value in settings.items() if before[name] is None})
    accelerator = Accelerator(log_with=list(names), project_dir=folder)
    flat = {name: _to_flat_value(value) for name, value in pandas.json_normalize(config).iloc[0].to_dict().items()}
    options = {"wandb": {"name": folder.name, "dir": str(folder)}, "mlflow": {"run_name": folder.name}}
    accelerator.init_trackers(PROJECT, flat, {name: options[name] for name in names if name in options})
    try:
        yield Tracks(accelerator)
    finally:
        accelerator.end_training()
        for name in [name for name, value in before.items() if value is None]:
            del os.environ[name]


def _to_flat_value(value: object) -> object:
    """Convert a value of the configuration to a type that every tracker accepts."""
    return value if isinstance(value, bool | int | float | str) else str(value)
