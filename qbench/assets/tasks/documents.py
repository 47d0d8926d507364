"""The documents of the tasks here, whatever the working directory, in which lm-eval looks for `data_files`."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(file: str, **metadata: Any) -> dict[str, Dataset]:
    """The documents of a task, in memory. metadata: the task's, which lm-eval passes too."""
    lines = (Path(__file__).parent / file).read_text("utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
