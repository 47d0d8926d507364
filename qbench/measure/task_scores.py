"""What a model scores on lm-eval's tasks, and how far that is from the baseline, document by document.

lm-eval compares two models by the standard error of each, as if they had seen different documents. They have seen the
same, and most of what makes a document hard is the same for both: the paired difference has a fraction of that error.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.metrics import mean, perplexity, weighted_perplexity
from lm_eval.utils import handle_non_serializable, sanitize_task_name

from qbench.system import files

from .statistics import clustered_mean, paired_difference

if TYPE_CHECKING:
    from .tasks import Tasks

BLOCKS = 200  #: of documents that the jackknife leaves out in turn, at most


@dataclass
class Score:
    """value, stderr: of a metric. ids: the documents that have it. documents: numbers whose mean is the value, or where it
    is a perplexity its logarithm (`log`); None where the value cannot be shared out."""

    value: float
    stderr: float | None
    ids: list
    documents: np.ndarray | None
    log: bool = False

    def metrics(self, baseline: "Score | None") -> dict:
        found: dict[str, Any] = {"value": self.value, "stderr": self.stderr, "n": len(self.ids), "log": self.log}
        found["documents"] = None if self.documents is None else self.documents.tolist()
        if baseline and baseline.ids == self.ids and self.documents is not None and baseline.documents is not None:
            delta, stderr, p = paired_difference(self.documents[None], baseline.documents[None])
            found["against_baseline"] = {"delta": delta, "stderr": stderr, "p": p}
        return found


@dataclass
class TaskScores:
    """results: as lm-eval gives them. samples: by task, a record of every document."""

    results: dict
    samples: dict[str, list[dict]]

    def save(self, folder: Path, stage: str) -> None:
        """Write `stage`.json and the samples of each task, as lm-eval serialises them. Raises OSError."""
        folder.mkdir(exist_ok=True)
        with files.replaced(folder / f"{stage}.json") as file:
            file.write(_text(self.results, indent=2).encode())
        for task, rows in self.samples.items():
            with files.replaced(_samples(folder, stage, task)) as file:
                file.writelines(f"{_text(row)}\n".encode() for row in rows)

    @classmethod
    def read(cls, folder: Path, stage: str) -> "TaskScores":
        """What `save` wrote."""
        results = json.loads((folder / f"{stage}.json").read_text("utf-8"))
        samples = {}
        for task in results["configs"]:
            with _samples(folder, stage, task).open(encoding="utf-8") as lines:
                samples[task] = [json.loads(line) for line in lines]
        return cls(results, samples)

    def metrics(self, tasks: "Tasks", baseline: "TaskScores | None" = None) -> dict:
        """By task or group of tasks, by metric (and filter, where it is not `none`): value, stderr, n, the number of
        documents, higher_is_better, and `log` and `documents` of Score. A task in a group names it.

        Against a baseline, paired on the documents: delta, of the logarithm where `log` is true, its stderr and p value.
        """
        theirs = dict(baseline._scores(tasks)) if baseline else {}
        found: dict[str, dict] = {}
        for (task, key), score in self._scores(tasks):
            metric, _, kind = key.partition(",")
            better = self.results["higher_is_better"].get(task, {}).get(metric)
            within = {"group": tasks.inside[task]} if task in tasks.inside else {}
            entry = score.metrics(theirs.get((task, key))) | {"higher_is_better": better} | within
            found.setdefault(task, {})[metric if kind == "none" else key] = entry
        return found

    def _scores(self, tasks: "Tasks") -> Iterator[tuple[tuple[str, str], Score]]:
        """By name of the task or group, and lm-eval's of the metric, such as `acc,none`: groups after their tasks."""
        found: dict[tuple[str, str], Score] = {}
        for task in [*tasks.leaves, *tasks.groups]:
            told = self.results["results"].get(task, {})
            for key, value in told.items():
                metric, _, kind = key.partition(",")
                if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                if task in tasks.leaves:
                    score = self._score(task, metric, kind, value, tasks.leaves[task].aggregation().get(metric, mean))
                else:
                    parts = [found[leaf, key] for leaf in tasks.groups[task] if (leaf, key) in found]
                    score = _together(value, parts)
                stderr = told.get(f"{metric}_stderr,{kind}")
                if isinstance(stderr, int | float):
                    score.stderr = stderr
                found[task, key] = score
        yield from found.items()

    def _score(self, task: str, metric: str, kind: str, value: float, aggregate: Callable) -> Score:
        rows = [row for row in self.samples[task] if row["filter"] == kind and metric in row]
        ids, items = [(row["doc_id"], row["doc_hash"]) for row in rows], [row[metric] for row in rows]
        log = aggregate in (perplexity, weighted_perplexity)
        try:
            documents = shares((lambda some: math.log(aggregate(some))) if log else aggregate, items)
        except (ValueError, TypeError, ArithmeticError):  # the aggregation needs all documents, or makes no number
            return Score(value, None, ids, None, log)
        stderr = clustered_mean(documents[:, None])[1]
        return Score(value, stderr * value if log else stderr, ids, documents, log)


def shares(aggregate: Callable[[Sequence], float], items: Sequence) -> np.ndarray:
    """Numbers [n] whose mean is aggregate(items), and whose spread is its error: the items themselves, of a mean.

    Of anything else they are the jackknife's pseudo-values (Tukey 1958, "Bias and confidence in not quite large samples"),
    for blocks of items where there are more than `BLOCKS`, moved by its estimate of the bias so that the mean is exact.
    """
    if aggregate is mean:
        return np.asarray(items, np.float64)
    whole, n = aggregate(items), min(len(items), BLOCKS)
    if n < 2:
        return np.array([whole], np.float64)
    edges = np.linspace(0, len(items), n + 1).astype(int)
    rest = np.array([aggregate([*items[:a], *items[b:]]) for a, b in pairwise(edges)], np.float64)
    return whole + (n - 1) * (rest.mean() - rest)


def _together(value: float, parts: list[Score]) -> Score:
    """A group's score, shared out where it is the mean over the documents of its tasks."""
    ids = [each for part in parts for each in part.ids]
    if any(part.documents is None or part.log for part in parts) or not ids:
        return Score(value, None, ids, None)
    documents = np.concatenate([part.documents for part in parts])
    return Score(value, None, ids, documents if math.isclose(documents.mean(), value, rel_tol=1e-9) else None)


def _samples(folder: Path, stage: str, task: str) -> Path:
    return folder / f"{stage}_{sanitize_task_name(task)}.jsonl"


def _text(content: dict, **options: Any) -> str:
    return json.dumps(content, default=handle_non_serializable, ensure_ascii=False, **options)
