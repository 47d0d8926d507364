"""Scores of a model on lm-eval's tasks, and their paired difference from the baseline, document by document.

lm-eval compares two models by the standard error of each, as if they had seen different documents. They see the same
documents, and a document that is hard for one is hard for the other. So the error of the paired difference is much
smaller.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean, perplexity, weighted_perplexity
from lm_eval.api.task import Task
from lm_eval.utils import handle_non_serializable, sanitize_task_name

from qbench.system import files

from .statistics import clustered_mean, paired_difference

BLOCKS = 200  #: most blocks of documents that the jackknife leaves out in turn


@dataclass
class Tasks:
    """Loaded tasks. top: the requested tasks and groups. leaves: every task, by name.

    groups: for each group, the names of all its tasks. parents: for each task or group, the group that it is in.
    """

    top: list[Task | Group] = field(default_factory=list)
    leaves: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)

    def count_documents(self, limit: int | None = None) -> int:
        """The number of documents, with at most `limit` of each task."""
        return sum(min(len(task.eval_docs), limit or len(task.eval_docs)) for task in self.leaves.values())


@dataclass
class Score:
    """The value of a metric and its standard error. ids: the documents that it covers.

    documents: one number for each document (or block of documents), whose mean is the value, or with `log` the value's
    logarithm, as for a perplexity. None if the value is no such mean.
    """

    value: float
    stderr: float | None
    ids: list
    documents: np.ndarray | None
    log: bool = False

    def metrics(self, baseline: "Score | None") -> dict:
        entry: dict[str, Any] = {"value": self.value, "stderr": self.stderr, "n": len(self.ids), "log": self.log}
        entry["documents"] = None if self.documents is None else self.documents.tolist()
        if baseline and baseline.ids == self.ids and self.documents is not None and baseline.documents is not None:
            delta, stderr, p = paired_difference(self.documents[None], baseline.documents[None])
            entry["against_baseline"] = {"delta": delta, "stderr": stderr, "p": p}
        return entry


@dataclass
class TaskScores:
    """The scores of a model on tasks. results: as lm-eval returns them. samples: by task, a record of each document."""

    results: dict
    samples: dict[str, list[dict]]

    def save(self, folder: Path, stage: str) -> None:
        """Write `stage`.json and the samples of each task, serialized as by lm-eval. Raises OSError."""
        folder.mkdir(exist_ok=True)
        with files.atomic_write(folder / f"{stage}.json") as file:
            file.write(_to_json(self.results, indent=2).encode())
        for task, rows in self.samples.items():
            with files.atomic_write(_samples_file(folder, stage, task)) as file:
                file.writelines(f"{_to_json(row)}\n".encode() for row in rows)

    @classmethod
    def read(cls, folder: Path, stage: str) -> "TaskScores":
        """Read what `save` wrote."""
        results = json.loads((folder / f"{stage}.json").read_text("utf-8"))
        samples = {}
        for task in results["configs"]:
            with _samples_file(folder, stage, task).open(encoding="utf-8") as lines:
                samples[task] = [json.loads(line) for line in lines]
        return cls(results, samples)

    def metrics(self, tasks: Tasks, baseline: "TaskScores | None" = None) -> dict:
        """Scores by task or group, then by metric (with its filter, unless that is `none`).

        Each has value, stderr, n (documents), higher_is_better, `log` and `documents` of Score; in a group also group.
        With a baseline also against_baseline: the paired delta (of the logarithm if `log`), its stderr and p value.
        """
        theirs = dict(baseline._iterate_scores(tasks)) if baseline else {}
        metrics: dict[str, dict] = {}
        for (task, key), score in self._iterate_scores(tasks):
            metric, _, kind = key.partition(",")
            better = self.results["higher_is_better"].get(task, {}).get(metric)
            group = {"group": tasks.parents[task]} if task in tasks.parents else {}
            entry = score.metrics(theirs.get((task, key))) | {"higher_is_better": better} | group
            metrics.setdefault(task, {})[metric if kind == "none" else key] = entry
        return metrics

    def _iterate_scores(self, tasks: Tasks) -> Iterator[tuple[tuple[str, str], Score]]:
        """Scores by (task or group, lm-eval's key of the metric, such as `acc,none`), with groups after their tasks."""
        scores: dict[tuple[str, str], Score] = {}
        for task in [*tasks.leaves, *tasks.groups]:
            results = self.results["results"].get(task, {})
            for key, value in results.items():
                metric, _, kind = key.partition(",")
                if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                if task in tasks.leaves:
                    score = self._score_task(
                        task, metric, kind, value, tasks.leaves[task].aggregation().get(metric, mean)
                    )
                else:
                    parts = [scores[leaf, key] for leaf in tasks.groups[task] if (leaf, key) in scores]
                    score = _group_score(value, parts)
                stderr = results.get(f"{metric}_stderr,{kind}")
                if isinstance(stderr, int | float):
                    score.stderr = stderr
                scores[task, key] = score
        yield from scores.items()

    def _score_task(self, task: str, metric: str, kind: str, value: float, aggregate: Callable) -> Score:
        rows = [row for row in self.samples[task] if row["filter"] == kind and metric in row]
        ids, items = [(row["doc_id"], row["doc_hash"]) for row in rows], [row[metric] for row in rows]
        log = aggregate in (perplexity, weighted_perplexity)
        try:
            documents = pseudo_values((lambda subset: math.log(aggregate(subset))) if log else aggregate, items)
        except (ValueError, TypeError, ArithmeticError):  # the aggregation needs all documents, or gives no number
            return Score(value, None, ids, None, log)
        stderr = clustered_mean(documents[:, None])[1]
        return Score(value, stderr * value if log else stderr, ids, documents, log)


def pseudo_values(aggregate: Callable[[Sequence], float], items: Sequence) -> np.ndarray:
    """Numbers [n] whose mean is aggregate(items), and whose spread gives its standard error.

    For a mean they are the items. Otherwise they are the jackknife's pseudo-values (Tukey 1958, "Bias and confidence in
    not quite large samples"), shifted by its estimate of the bias, so that their mean is exact. With more than `BLOCKS`
    items, blocks of items are left out instead of single ones.
    """
    if aggregate is mean:
        return np.asarray(items, np.float64)
    whole, n = aggregate(items), min(len(items), BLOCKS)
    if n < 2:
        return np.array([whole], np.float64)
    edges = np.linspace(0, len(items), n + 1).astype(int)
    without = np.array([aggregate([*items[:a], *items[b:]]) for a, b in pairwise(edges)], np.float64)
    return whole + (n - 1) * (without.mean() - without)


def _group_score(value: float, parts: list[Score]) -> Score:
    """The score of a group; it has `documents` if its value is the mean over the documents of its tasks."""
    ids = [document for part in parts for document in part.ids]
    if any(part.documents is None or part.log for part in parts) or not ids:
        return Score(value, None, ids, None)
    documents = np.concatenate([part.documents for part in parts])
    return Score(value, None, ids, documents if math.isclose(documents.mean(), value, rel_tol=1e-9) else None)


def _samples_file(folder: Path, stage: str, task: str) -> Path:
    return folder / f"{stage}_{sanitize_task_name(task)}.jsonl"


def _to_json(content: dict, **options: Any) -> str:
    return json.dumps(content, default=handle_non_serializable, ensure_ascii=False, **options)
