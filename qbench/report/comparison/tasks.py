"""Scores on lm-eval's tasks, compared with 16 bit on the same documents."""

from dataclasses import dataclass, field
from functools import lru_cache

from qbench.report.table import Cell, Column, Row, Table
from qbench.report.task_wording import (
    better_sign,
    format_change,
    format_score,
    list_scores,
    reading_note,
    score_name,
)
from qbench.report.wording import join_names, shorten

from .configurations import Configuration, Setting, pair_with_16_bit
from .differences import Difference, compare_windows, correct_p_values
from .main_table import build_row

MOST = 8  #: tasks in the table


@dataclass(eq=False)
class TaskScore:
    """The first metric of a task at a stage.

    sign: 1 if more is better, else −1. log: whether differences are of logarithms, as for a perplexity. differences:
    from 16 bit, by configuration; p is corrected for all tasks and configurations of the stage.
    """

    stage: str
    task: str
    metric: str
    sign: int
    log: bool
    differences: dict[Configuration, Difference] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the score in the metrics of a run."""
        return "tasks", self.stage, self.task, self.metric

    def compare(self, ours: Configuration, theirs: Configuration) -> Difference | None:
        """ours − theirs on the same documents, with its uncorrected p; None if they cannot be paired."""
        first, second = (c.windows(*self.keys, each="documents") for c in (ours, theirs))
        return compare_windows(first, second, same_seeds=self.stage == "tuned")

    def column(self) -> Column:
        head = "tuned " * (self.stage == "tuned") + score_name(self.task, self.metric)
        return Column(head, "mean over seeds, and the difference from 16 bit", "more" if self.sign > 0 else "less")

    def cell(self, c: Configuration) -> Cell:
        value, d = c.mean(*self.keys, "value"), self.differences.get(c)
        if value is None:
            return Cell()
        change = f" {format_change(self.log, d.delta, d.stderr, d.p)}" if d else ""
        return Cell(format_score(value) + change, value)


@lru_cache
def compare_tasks(setting: Setting) -> list[TaskScore]:
    """The first metric of every task, or group of tasks, at each stage, tested against 16 bit."""
    scores: list[TaskScore] = []
    for stage in setting.stages:
        by_task = _first_metrics(setting, stage)
        pairs = [
            (s, c, base) for s in by_task.values() for c, base in pair_with_16_bit(setting.scored_at(stage), stage)
        ]
        family = correct_p_values([s.compare(c, base) if base else None for s, c, base in pairs])
        for (s, c, _), d in zip(pairs, family, strict=True):
            if d:
                s.differences[c] = d
        scores += by_task.values()
    return scores


def _first_metrics(setting: Setting, stage: str) -> dict[str, TaskScore]:
    """By task, its first metric among the scores of all runs at a stage."""
    by_task: dict[str, TaskScore] = {}
    for result in (result for c in setting.configurations for result in c.results):
        tasks = result["metrics"].get("tasks", {}).get(stage, {})
        for task, metric in list_scores(tasks):
            score = tasks[task][metric]
            by_task.setdefault(task, TaskScore(stage, task, metric, better_sign(score), score["log"]))
    return by_task


def describe_tasks(setting: Setting) -> list[str]:
    """How many task scores differ from 16 bit, a finding for each stage."""
    findings = []
    for stage in setting.stages:
        tested = [(s, c, d) for s in compare_tasks(setting) if s.stage == stage for c, d in s.differences.items()]
        if not tested:
            continue
        distinct = sorted((test for test in tested if test[2].distinguishable), key=lambda test: test[2].p)
        reference = f"{setting.method} on 16 bit" if stage == "tuned" else "16 bit"
        sentence = f"{setting.when(stage)}, {len(tested) - len(distinct)} of {len(tested)} task scores are not"
        sentences = [f"{sentence[0].upper()}{sentence[1:]} distinguishable from {reference}."]
        for word, sign in (("worse", -1), ("better", 1)):
            names = [f"{c.title} on {shorten(s.task)}" for s, c, d in distinct if d.delta * s.sign * sign > 0]
            if names:
                sentences.append(f"{len(names)} are {word}: {join_names(names, '; ')}.")
        findings.append(" ".join(sentences))
    return findings


def tasks_table(setting: Setting) -> Table:
    """The configurations, and their scores on the first MOST tasks; without rows where no task was scored."""
    scores = compare_tasks(setting)
    tasks = list(dict.fromkeys(s.task for s in scores))
    shown = [s for s in scores if s.task in tasks[:MOST]]
    untuned = {c.recipe: c for c in setting.scored_at("quantized")}
    rows: list[Row] = []
    for c in setting.configurations if shown else ():
        cells = [s.cell(untuned[c.recipe] if s.stage == "quantized" else c) for s in shown]
        rows.append(build_row(c, [Cell(c.title), *cells]))
    columns = [Column("format", "format, block and double quantization"), *(s.column() for s in shown)]
    more = " results.csv has all tasks." if len(tasks) > MOST else ""
    note = reading_note("16 bit", ", corrected for the number of tests at one stage") + more
    return Table(columns, rows, "Tasks", note)
