"""python -m qbench.report PATH…: finished runs side by side, as a Markdown table on standard output.

The paths are result.json files or folders above them. Runs on the same model, text and windows are compared with the
16-bit run among them, before and after the fine-tune, paired over windows of the same tokens.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from .. import record
from ..measure.statistics import paired
from .words import plus_minus, title

COLUMNS = ["", "bits/w", "SQNR, dB", "perplexity", "Δ nll", "KL", "tuned perplexity", "Δ nll to 16-bit tuned"]


def comparable(result: dict) -> str:
    """What two runs must share for their windows to be the same tokens, fine-tuned in the same way."""
    config = result["config"]
    return str([config[key] for key in ("model", "data", "eval", "tune", "seed")])


def difference(result: dict, reference: dict | None, stage: str) -> str:
    """Δ nll ± its standard error between two runs at a stage, paired over windows; empty where they cannot be."""
    if reference is None or reference is result:
        return ""
    ours, theirs = (np.array(r["metrics"]["quality"][stage]["windows"])[:, None] for r in (result, reference))
    found = paired(ours, theirs)
    return plus_minus(found["delta_nll"], found["stderr"], "+.4f")


def rows(results: list[dict]) -> list[list[str]]:
    """A row a run, the best perplexity before the fine-tune first."""
    baselines = {comparable(r): r for r in results if r["config"]["format"]["name"] == "none"}
    table = []
    for result in sorted(results, key=lambda r: r["metrics"]["quality"]["quantized"]["nll"]):
        metrics, reference = result["metrics"], baselines.get(comparable(result))
        scores, tuned = metrics["quality"]["quantized"], metrics["quality"].get("tuned")
        sqnr, kl = metrics["error"]["sqnr_db"], scores["against_baseline"]["kl_mean"]
        table.append(
            [
                title(result["config"]),
                f"{metrics['bits']['per_parameter']:.3f}",
                f"{sqnr:.2f}" if sqnr else "",
                f"{scores['perplexity']:.2f}",
                difference(result, reference, "quantized"),
                f"{kl:.4f}" if kl else "",
                plus_minus(tuned["perplexity"], None, ".2f") if tuned else "",
                difference(result, reference, "tuned") if tuned else "",
            ]
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qbench.report", description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    paths = parser.parse_args().paths
    for path in paths:
        if not path.exists():
            print(f"qbench: {path} does not exist; accepted: result.json files or folders above them", file=sys.stderr)
            return 2
    found, unreadable = record.read_readable(*paths)
    for reason in unreadable.values():
        print(f"qbench: skipped: {reason}", file=sys.stderr)
    results = [result for result in found.values() if result["status"] == "done"]
    if not results:
        print(f"qbench: no finished run under {', '.join(map(str, paths))}", file=sys.stderr)
        return 2
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for row in rows(results):
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
