"""python -m qbench.report PATH…: finished runs side by side, as a Markdown table on standard output.

The paths are result.json files or folders above them. Runs on the same model, text and windows are compared with the
16-bit runs among them, before and after the fine-tune, paired over windows of the same tokens and over seeds; ≈ stands
before a difference that is not distinguishable from none.
"""

import argparse
import sys
from pathlib import Path

from .. import record
from .compare import compare
from .words import plus_minus

COLUMNS = ["", "bits/w", "SQNR, dB", "perplexity", "Δ nll", "KL", "tuned perplexity", "Δ nll to 16-bit tuned"]


def rows(results: list[dict]) -> list[list[str]]:
    """A row a configuration, the best perplexity before the fine-tune first."""
    table = []
    for found in compare(results):
        sqnr, kl = found.mean("error", "sqnr_db"), found.mean("quality", "quantized", "against_baseline", "kl_mean")
        tuned = found.mean("quality", "tuned", "perplexity")
        seeds = f" ({len(found.runs)} seeds)" if len(found.runs) > 1 else ""
        table.append(
            [
                found.title + seeds,
                f"{found.mean('bits', 'per_parameter'):.3f}",
                f"{sqnr:.2f}" if sqnr else "",
                f"{found.mean('quality', 'quantized', 'perplexity'):.2f}",
                str(found.differences.get("quantized", "")),
                f"{kl:.4f}" if kl else "",
                plus_minus(tuned, found.stderr("quality", "tuned", "perplexity"), ".2f") if tuned else "",
                str(found.differences.get("tuned", "")),
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
    print("\n± is one standard error; ≈ marks a difference that is not distinguishable from none.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
