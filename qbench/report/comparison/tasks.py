"""What lm-eval's tasks say: of one run against its baseline, of many against 16 bit, paired on the same documents."""

from dataclasses import dataclass, field
from functools import lru_cache

from qbench.report import wording
from qbench.report.wording import SIGNIFICANT, grown, listed, number, plus_minus, short

from .configurations import STAGES, Configuration, Setting, references
from .differences import Difference, corrected, paired
from .table import Cell, Column, Row, Table

MOST = 8  #: tasks in the table of a comparison


def of_run(result: dict) -> wording.Table | None:
    """A row a score: the baseline's, then that of each stage and by how much it differs."""
    stages = _stages(result)
    if not stages:
        return None
    rows = []
    for task, metric in _scores(next(iter(stages.values()))):
        row = [_named(task, metric)]
        for name in stages:
            found = stages[name].get(task, {}).get(metric)
            row.append(_told(found) if found else "")
        rows.append(row)
    return wording.Table(["task", *stages], rows, _note("the baseline", ""))


def _named(task: str, metric: str) -> str:
    return f"{short(task)} {short(metric)}"


def _told(score: dict) -> str:
    against = score.get("against_baseline")
    if not against:
        return _value(score["value"])
    return f"{_value(score['value'])} {_change(score['log'], against['delta'], against['stderr'], against['p'])}"


def answer_of_run(result: dict) -> list[str]:
    """How many scores each stage moves, in a sentence."""
    told, tested = [], []
    for name, stage in _stages(result).items():
        scores = [stage[task][metric] for task, metric in _scores(stage)]
        tested = [score for score in scores if "against_baseline" in score]
        sure = [score for score in tested if _sure(score["against_baseline"]["p"])]
        worse = sum((score["against_baseline"]["delta"] or 0) * _better(score) < 0 for score in sure)
        if tested:
            told.append(f"{worse} of the {name} model are distinguishably worse, {len(sure) - worse} better")
    return [f"Of {len(tested)} task scores, compared with the baseline, {'; '.join(told)}."] if told else []


def _stages(result: dict) -> dict[str, dict]:
    """The scores by stage, the baseline's first."""
    found = result["metrics"].get("tasks", {})
    return {stage: found[stage] for stage in ("baseline", *STAGES) if stage in found}


@dataclass(eq=False)
class Compared:
    """One metric of a task at one stage. better: 1 where more of it is, else −1. log: whether it is a perplexity, whose
    differences are of logarithms. differences: from 16 bit, by what the stage tells apart, p corrected for all tasks and
    configurations there."""

    stage: str
    task: str
    metric: str
    better: int
    log: bool
    differences: dict[Configuration, Difference] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, ...]:
        """In the metrics of a run."""
        return "tasks", self.stage, self.task, self.metric

    def difference(self, ours: Configuration, theirs: Configuration) -> Difference | None:
        """ours − theirs on the same documents, p uncorrected."""
        first, second = (c.windows(*self.place, each="documents") for c in (ours, theirs))
        return paired(first, second, seeded=self.stage == "tuned")

    def column(self) -> Column:
        head = "tuned " * (self.stage == "tuned") + _named(self.task, self.metric)
        return Column(head, "mean over seeds, and the difference from 16 bit", "more" if self.better > 0 else "less")

    def cell(self, c: Configuration) -> Cell:
        value, found = c.mean(*self.place, "value"), self.differences.get(c)
        if value is None:
            return Cell()
        change = f" {_change(self.log, found.delta, found.stderr, found.p)}" if found else ""
        return Cell(_value(value) + change, value)


@lru_cache
def compare(setting: Setting) -> list[Compared]:
    """The first metric of every task, or group of tasks, that the runs of a setting scored, by stage."""
    found: list[Compared] = []
    for stage in setting.stages():
        scored: dict[str, Compared] = {}
        for result in (result for c in setting.configurations for _, result in c.runs.values()):
            tasks = result["metrics"].get("tasks", {}).get(stage, {})
            for task, metric in _scores(tasks):
                one = tasks[task][metric]
                scored.setdefault(task, Compared(stage, task, metric, _better(one), one["log"]))
        pairs = [(one, c, base) for one in scored.values() for c, base in references(setting.at(stage), stage)]
        family = corrected([one.difference(c, base) if base else None for one, c, base in pairs])
        for (one, c, _), known in zip(pairs, family, strict=True):
            if known:
                one.differences[c] = known
        found += scored.values()
    return found


def answer(setting: Setting) -> list[str]:
    """What the tasks say of the formats, a sentence a stage."""
    sentences = []
    for stage in setting.stages():
        tested = [(one, c, d) for one in compare(setting) if one.stage == stage for c, d in one.differences.items()]
        if not tested:
            continue
        sure = sorted((row for row in tested if row[2].distinguishable), key=lambda row: row[2].p)
        reference = f"{setting.method} on 16 bit" if stage == "tuned" else "16 bit"
        parts = [f"{len(tested) - len(sure)} of {len(tested)} task scores are not distinguishable from {reference}"]
        for word, sign in (("worse", -1), ("better", 1)):
            some = [f"{c.title} on {short(one.task)}" for one, c, d in sure if d.delta * one.better * sign > 0]
            parts += [f"{len(some)} are {word}: {listed(some)}"] if some else []
        said = f"{setting.when(stage)} {'; '.join(parts)}."
        sentences.append(said[0].upper() + said[1:])
    return sentences


def table(setting: Setting) -> Table:
    """The configurations, and how each does on the first tasks; no row where none was scored."""
    found = compare(setting)
    kept = list(dict.fromkeys(one.task for one in found))[:MOST]
    some = [one for one in found if one.task in kept]
    alone = {c.recipe: c for c in setting.at("quantized")}
    rows = [
        Row(c, [Cell(c.title), *(one.cell(alone[c.recipe] if one.stage == "quantized" else c) for one in some)])
        for c in setting.configurations
        if some
    ]
    columns = [Column("format", "the whole recipe"), *(one.column() for one in some)]
    more = "" if len(kept) == len({one.task for one in found}) else " More tasks are in results.csv."
    return Table("Tasks", columns, rows, _note("16 bit", ", corrected for the number of tests at one stage") + more)


def _scores(stage: dict) -> list[tuple[str, str]]:
    """Task and metric of the scores at a stage, but for those of tasks within a group."""
    return [(task, name) for task, found in stage.items() for name, one in found.items() if "group" not in one]


def _better(score: dict) -> int:
    more = score["higher_is_better"]
    return 1 if (more if more is not None else not score["log"]) else -1


def _sure(p: float | None) -> bool:
    return p is not None and p < SIGNIFICANT


def _value(value: float | None) -> str:
    return number(value, ".2f" if value and abs(value) >= 10 else ".4f")


def _change(log: bool, delta: float | None, stderr: float | None, p: float | None) -> str:
    """A difference, of logarithms as the per cent that it is."""
    if log and delta is not None:
        delta, stderr = 100 * grown(delta), stderr and 100 * (grown(delta) + 1) * stderr
    return ("" if _sure(p) else "≈ ") + plus_minus(delta, stderr, "+.2f" if log else "+.4f") + "%" * log


def _note(reference: str, correction: str) -> str:
    return (
        f"± is one standard error over documents. Differences are from {reference} on the same documents, of a perplexity"
        f" in per cent; ≈ marks one that is not distinguishable from none, p ≥ {SIGNIFICANT}{correction}."
    )
