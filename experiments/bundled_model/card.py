"""Write the model card and the README of the texts, from templates and what the recipe recorded.

    python experiments/bundled_model/card.py

Reads `sources.json`, `run.json` and `evaluation.json` in the work folder.
"""

import argparse
import json
import math
from pathlib import Path

from safetensors import safe_open

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "qbench" / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bundled_model"))
    work = parser.parse_args().work

    sources = json.loads((work / "sources.json").read_text())
    run = json.loads((work / "run.json").read_text())
    report = json.loads((work / "evaluation.json").read_text())
    config = json.loads((ASSETS / "model" / "config.json").read_text())
    weights = ASSETS / "model" / "model.safetensors"
    with safe_open(weights, "pt") as tensors:
        parameters = sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118
    train_tokens = (work / "train.bin").stat().st_size // 2

    def row(name: str, s: dict) -> str:
        stderr = f" ± {s['stderr']:.3f}" if s["stderr"] is not None else ""
        scores = f"{s['perplexity']:.1f} | {s['unigram_nll']:.3f} | {s['gain']:.3f} | {s['bits_per_byte']:.3f}"
        return f"| {name} | {s['clusters']} | {s['tokens']:,} | {s['nll']:.3f}{stderr} | {scores} |"

    rows = [row("**held out, all**", report["heldout"])]
    rows += [row(f"`{name}`", s) for name, s in report["sources"].items()]
    rows.append(row("King James Bible", report["kjv"]))
    data = [
        f"| `{s['package']}` | {s['version']} | {s['licence']} |"
        f" {s['train_characters']:,} | {s['heldout_characters']:,} |"
        for s in sources
    ]
    arguments = run["arguments"]
    facts = dict(
        config | arguments,
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        parameters=parameters,
        megabytes=weights.stat().st_size / 1e6,
        tokens_seen=run["tokens"],
        train_tokens=train_tokens,
        epochs=run["tokens"] / train_tokens,
        minutes=run["seconds"] / 60,
        rate=run["tokens"] / run["seconds"],
        precision="bfloat16 autocast" if arguments["bf16"] else "float32",
        final="zero" if run["factor"] < 0.01 else f"{run['factor']:.0%}",
        eval_seq=report["seq"],
        positions=", ".join(f"{k}: {v:.3f}" for k, v in report["by_position"].items()),
        scores="\n".join(rows),
        data="\n".join(data),
        train_characters=sum(s["train_characters"] for s in sources),
        heldout_characters=sum(s["heldout_characters"] for s in sources),
    )
    card = (HERE / "card.template.md").read_text().format(**facts)
    (ASSETS / "model" / "README.md").write_text(card)
    versions = {s["package"]: s["version"] for s in sources}
    origins = " and ".join(f"Debian package `{p}` {versions[p]}" for p in ("sqlite3-doc", "dict-jargon"))
    (ASSETS / "text" / "README.md").write_text((HERE / "texts.template.md").read_text().format(origins=origins))


if __name__ == "__main__":
    main()
