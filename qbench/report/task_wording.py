"""Scores on lm-eval's tasks in words, for one run and for a comparison.

`metrics.tasks` of a result holds stage → task → metric → score. A score has its value, the value of each document, and
after the baseline `against_baseline`, the paired difference.
"""

from qbench.report.wording import SIGNIFICANT, format_number, plus_minus, relative_change, shorten

STAGES = ("baseline", "quantized", "tuned")  #: the stages of a run that tasks score, in order


def list_scores(stage: dict) -> list[tuple[str, str]]:
    """(task, metric) of each score at a stage, without the tasks inside a group."""
    return [(task, metric) for task, scores in stage.items() for metric, s in scores.items() if "group" not in s]


def score_name(task: str, metric: str) -> str:
    """`qbench_grammar acc`."""
    return f"{shorten(task)} {shorten(metric)}"


def better_sign(score: dict) -> int:
    """1 if more is better, −1 if less is. Where lm-eval does not say, less perplexity is better."""
    more = score["higher_is_better"]
    return 1 if (more if more is not None else not score["log"]) else -1


def is_significant(p: float | None) -> bool:
    return p is not None and p < SIGNIFICANT


def format_score(value: float | None) -> str:
    return format_number(value, ".2f" if value and abs(value) >= 10 else ".4f")


def format_change(log: bool, delta: float | None, stderr: float | None, p: float | None) -> str:
    """A difference, with ≈ where it is not distinguishable. log: of logarithms, shown as per cent of the perplexity."""
    if log and delta is not None:
        factor = relative_change(delta)
        delta, stderr = 100 * factor, stderr and 100 * (factor + 1) * stderr
    return ("" if is_significant(p) else "≈ ") + plus_minus(delta, stderr, "+.2f" if log else "+.4f") + "%" * log


def reading_note(reference: str, correction: str = "") -> str:
    """How to read a table of tasks. correction: how the p values were corrected, after a comma."""
    return (
        f"± is one standard error over documents. Differences are from {reference} on the same documents, in per cent for"
        f" a perplexity. ≈ marks a difference that is not distinguishable from zero (p ≥ {SIGNIFICANT}{correction})."
    )
