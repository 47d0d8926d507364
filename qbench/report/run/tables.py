"""The scores of one run as tables."""

from qbench.report.run.answer import format_rate
from qbench.report.table import Table
from qbench.report.task_wording import STAGES, format_change, format_score, list_scores, reading_note, score_name
from qbench.report.wording import MERGED, format_number, merged_scores, plus_minus

NOTE = (
    "± is one standard error over windows. Δ nll and KL compare with the baseline on the same tokens, in nats per token."
    " top-1 is how often the most probable token is the baseline's. prefill and decode are tokens/s of one sequence."
)


def scores_table(result: dict) -> Table:
    """A row for each stage that was scored, and for packed and merged adapters."""
    metrics = result["metrics"]
    bits, memory, rates, quality = (metrics[key] for key in ("bits", "memory", "throughput", "quality"))
    heads = ["", "perplexity", "Δ nll", "KL", "top-1", "bits/w", "MB", "prefill", "decode"]
    tuned_bytes = memory.get("tuned_bytes")
    stages = (
        ("baseline", bits["baseline"], memory["baseline_bytes"], rates.get("baseline")),
        ("quantized", bits["per_parameter"], memory["model_bytes"], rates),
        ("initial", bits["per_parameter"], tuned_bytes, None),
        ("tuned", bits["per_parameter"], tuned_bytes, rates.get("tuned")),
    )
    rows = [_score_texts(name, quality[name], *sizes) for name, *sizes in stages if quality.get(name)]
    for kind, scores in merged_scores(metrics).items():
        rows.append(_score_texts(MERGED[kind], scores, None, scores["bytes"], None))
    return Table.from_texts(heads, rows, NOTE)


def _score_texts(name: str, scores: dict, bits: float | None, nbytes: int | None, rates: dict | None) -> list[str]:
    """The texts of a row of the scores table."""
    against, rates = scores.get("against_baseline"), rates or {}
    return [
        name,
        plus_minus(scores["perplexity"], (scores["perplexity"] or 0) * (scores["stderr"] or 0), ".2f"),
        plus_minus(against["delta_nll"], against["stderr"], "+.4f") if against else "",
        format_number(against["kl_mean"], ".4f") if against else "",
        format_number(against["top1_agreement"], ".1%") if against else "",
        format_number(bits, ".3f") if bits else "",
        format_number(nbytes / 1e6, ".1f") if nbytes else "",
        format_rate(rates.get("prefill_tokens_s")),
        format_rate(rates.get("decode_tokens_s")),
    ]


def tasks_table(result: dict) -> Table | None:
    """A row for each score on a task: the baseline's, then at each stage with its difference. None without tasks."""
    tasks = result["metrics"].get("tasks", {})
    stages = {name: tasks[name] for name in STAGES if name in tasks}
    if not stages:
        return None
    rows = []
    for task, metric in list_scores(next(iter(stages.values()))):
        scores = [stage.get(task, {}).get(metric) for stage in stages.values()]
        rows.append([score_name(task, metric), *(_task_text(score) if score else "" for score in scores)])
    return Table.from_texts(["task", *stages], rows, reading_note("the baseline"))


def _task_text(score: dict) -> str:
    value, against = format_score(score["value"]), score.get("against_baseline")
    if not against:
        return value
    return f"{value} {format_change(score['log'], against['delta'], against['stderr'], against['p'])}"
