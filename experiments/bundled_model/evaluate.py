"""Score a model on the held-out split, per source, and on the King James Bible, beside a unigram model.

    python experiments/bundled_model/evaluate.py --model qbench/assets/model

Writes `evaluation.json` to the work folder; card.py turns it into the model card.
"""

import argparse
import json
import lzma
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

ASSETS = Path(__file__).resolve().parents[2] / "qbench" / "assets"


@torch.inference_mode()
def losses(model: PreTrainedModel, windows: list[list[int]], batch: int, label: str) -> list[Tensor]:
    """Returns the loss of every token but the first, one tensor per window. Windows of one length share a batch."""
    result: list[Tensor] = [torch.empty(0)] * len(windows)
    order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
    groups: list[list[int]] = []
    for i in order:
        if groups and len(groups[-1]) < batch and len(windows[groups[-1][0]]) == len(windows[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in track(groups, description=label):
        ids = torch.tensor([windows[i] for i in group])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(group), -1)
        for i, row in zip(group, loss, strict=True):
            result[i] = row
    return result


def cut(ids: list[int], length: int) -> list[list[int]]:
    """Cut tokens into windows that overlap by one token, so that each token but the first is scored once."""
    return [w for s in range(0, len(ids) - 1, length) if len(w := ids[s : s + length + 1]) > 1]


def score(rows: list[Tensor], unigram: list[Tensor], clusters: list[int], tokens_per_byte: float) -> dict:
    """Returns the mean loss per token, its standard error, and the loss of the unigram model on the same tokens.

    Tokens of one document are not independent: `clusters` says which document each row is from, and the mean is a
    ratio of two sums over documents. One document alone has no standard error.
    """
    tokens = sum(map(len, rows))
    nll = sum(r.double().sum().item() for r in rows) / tokens
    residuals: dict[int, float] = {}
    for row, cluster in zip(rows, clusters, strict=True):
        residuals[cluster] = residuals.get(cluster, 0.0) + row.double().sum().item() - nll * len(row)
    n = len(residuals)
    stderr = math.sqrt(n / (n - 1) * sum(r * r for r in residuals.values())) / tokens if n > 1 else None
    base = sum(r.double().sum().item() for r in unigram) / tokens
    return dict(tokens=tokens, clusters=n, nll=nll, stderr=stderr, perplexity=math.exp(nll), unigram_nll=base,
                gain=base - nll, bits_per_byte=nll / math.log(2) * tokens_per_byte)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bundled_model"))
    parser.add_argument("--model", type=Path, default=ASSETS / "model")
    parser.add_argument("--seq", type=int, default=1024, help="tokens a window")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--kjv-tokens", type=int, default=131_072)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    counts = np.bincount(np.fromfile(args.work / "train.bin", dtype=np.uint16), minlength=model.config.vocab_size)
    unigram = -torch.from_numpy(np.log((counts + 1) / (counts.sum() + len(counts))))

    def unigram_losses(windows: list[list[int]]) -> list[Tensor]:
        return [unigram[torch.tensor(w[1:])] for w in windows]

    heldout = json.loads((args.work / "heldout.json").read_text())
    pieces = [(i, window) for i, d in enumerate(heldout) for window in cut(d["ids"], args.seq)]
    owners, windows = [i for i, _ in pieces], [window for _, window in pieces]
    rows, base = losses(model, windows, args.batch, "held out"), unigram_losses(windows)

    def over(source: str | None) -> dict:
        documents = {i for i, d in enumerate(heldout) if source in (None, d["source"])}
        mine = [k for k, owner in enumerate(owners) if owner in documents]
        size = sum(heldout[i]["bytes"] for i in documents)
        per_byte = sum(len(heldout[i]["ids"]) for i in documents) / size
        return score([rows[k] for k in mine], [base[k] for k in mine], [owners[k] for k in mine], per_byte)

    sources = sorted({d["source"] for d in heldout})
    report = dict(seq=args.seq, heldout=over(None), sources={source: over(source) for source in sources})
    full = [r for r in rows if len(r) == args.seq]
    edges = [e for e in (0, 64, 128, 256, 512, 1024) if e < args.seq] + [args.seq]
    report["by_position"] = {f"{a}-{b}": torch.stack(full)[:, a:b].mean().item() for a, b in pairwise(edges)}

    text = lzma.decompress((ASSETS / "text" / "kjv.txt.xz").read_bytes()).decode()
    ids = tokenizer(text, verbose=False)["input_ids"]
    windows = cut(ids, args.seq)
    # Windows from the whole book, because its language changes from Genesis to the epistles.
    chosen = windows[:: max(1, len(windows) * args.seq // args.kjv_tokens)]
    kjv = losses(model, chosen, args.batch, "King James Bible")
    report["kjv"] = score(kjv, unigram_losses(chosen), list(range(len(chosen))), len(ids) / len(text.encode()))

    (args.work / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "sources"}, indent=1))


if __name__ == "__main__":
    main()
