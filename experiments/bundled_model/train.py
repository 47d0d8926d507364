"""Train the bundled model on a CPU, or export its last checkpoint.

    python experiments/bundled_model/train.py --tokens 12e6 --deadline-minutes 70
    python experiments/bundled_model/train.py --export qbench/assets/model

Needs `train.bin`, `heldout.json` and `tokenizer/` in the work folder (corpus.py, tokenizer.py). Ctrl-C or SIGTERM saves
and stops; the same command continues. `log.jsonl` in the work folder holds the losses.
"""

import argparse
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

VOCABULARY, POSITIONS, END_ID = 4096, 1024, 0


def build(seed: int) -> LlamaForCausalLM:
    """Make the untrained model: 9 layers, every matrix dimension a multiple of 64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=9, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=POSITIONS, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=None, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # Residual branches start small, so that the sum does not grow with the number of layers.
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    return model


def next_token_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Returns the mean next-token loss over windows of length + 1 tokens."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Make the optimizers: Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    ours = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ours]
    chosen = [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.adam_lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-10),
    ]
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return chosen


class Windows:
    """Non-overlapping windows of the token stream, shuffled, and cut at another offset in each epoch."""

    def __init__(self, path: Path, seed: int) -> None:
        self.tokens, self.seed = np.fromfile(path, dtype=np.uint16), seed

    def batch(self, position: int, count: int, length: int) -> Tensor:
        """Returns `count` windows of length + 1 tokens, for a run that has seen `position` tokens."""
        first = position // length
        per_epoch = (len(self.tokens) - length - 1) // length - 1
        rows = []
        for number in range(first, first + count):
            epoch, index = divmod(number, per_epoch)
            rng = np.random.default_rng((self.seed, epoch, length))
            shift, order = rng.integers(length), rng.permutation(per_epoch)
            start = shift + order[index] * length
            rows.append(self.tokens[start : start + length + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def save_atomically(state: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    model = build(args.seed)
    chosen = optimizers(model, args)
    windows = Windows(args.work / "train.bin", args.seed)
    monitor = [i for d in json.loads((args.work / "heldout.json").read_text()) for i in d["ids"]]
    stride = len(monitor) // 64
    monitor = torch.tensor([monitor[k * stride : k * stride + 257] for k in range(64)])

    path = args.work / "checkpoint.pt"
    seen, seconds, factor = 0, 0.0, 1.0
    if path.exists() and not args.fresh:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(chosen, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        seen, seconds, factor = state["tokens"], state["seconds"], state["factor"]
        print(f"going on from {seen:,} tokens")

    def checkpoint() -> None:
        save_atomically(
            dict(model=model.state_dict(), optimizers=[o.state_dict() for o in chosen], tokens=seen,
                 seconds=seconds + time.monotonic() - started, factor=factor, arguments=args_for_the_record),
            path,
        )  # fmt: skip

    args_for_the_record = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    loss_of = torch.compile(next_token_loss, dynamic=False) if args.compile else next_token_loss
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))

    started = saved_at = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress, open(args.work / "log.jsonl", "a", encoding="utf-8") as log:
        bar = progress.add_task("training", total=args.tokens, completed=seen)
        step = seen // args.batch_tokens
        while seen < args.tokens and not stop:
            elapsed = (time.monotonic() - started) / 60
            # Constant, then linear decay until the tokens or the time run out, whichever is first.
            left = min(1 - seen / args.tokens, 1 - elapsed / args.deadline_minutes)
            factor = min(factor, max(0.0, left / args.decay))
            if factor == 0.0:
                break
            rate = factor * min(1.0, (seen + args.batch_tokens) / args.warmup_tokens)
            for optimizer in chosen:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["peak_lr"]

            length = args.seq if factor == 1.0 else args.decay_seq
            micro = args.micro_tokens // length
            parts = args.batch_tokens // (micro * length)
            total = 0.0
            for ids in windows.batch(seen, micro * parts, length).split(micro):
                with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                    loss = loss_of(model, ids)
                (loss / parts).backward()
                total += loss.item() / parts
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            if not math.isfinite(norm):
                raise FloatingPointError(f"gradient norm {norm} after {seen:,} tokens")
            for optimizer in chosen:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            seen += micro * parts * length
            step += 1
            row = dict(step=step, tokens=seen, seconds=round(seconds + time.monotonic() - started, 1),
                       loss=round(total, 4), norm=round(norm, 3), rate=round(rate, 4), length=length)  # fmt: skip
            if step % args.monitor_every == 0:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                    row["heldout"] = round(next_token_loss(model, monitor).item(), 4)
            print(json.dumps(row), file=log, flush=True)
            progress.update(bar, completed=seen, description=f"step {step}  loss {total:.3f}")
            if not progress.console.is_terminal and step % 10 == 0:
                print(row, flush=True)
            if time.monotonic() - saved_at > 60 * args.save_minutes:
                checkpoint()
                saved_at = time.monotonic()
        checkpoint()
    print(f"{'stopped' if stop else 'done'} after {seen:,} tokens")


def export(args: argparse.Namespace) -> None:
    """Write the last checkpoint as a bfloat16 model folder that loads without a network."""
    state = torch.load(args.work / "checkpoint.pt", weights_only=True)
    model = build(args.seed)
    model.load_state_dict(state["model"])
    model.config.use_cache = True
    model.generation_config = GenerationConfig(bos_token_id=END_ID, eos_token_id=END_ID)
    model.to(torch.bfloat16).save_pretrained(args.export)
    for file in [*(args.work / "tokenizer").iterdir(), args.export / "model.safetensors"]:
        target = args.export / file.name
        if file != target:
            shutil.copyfile(file, target)
        target.chmod(0o644)  # safetensors makes it readable by the owner only
    (args.work / "run.json").write_text(
        json.dumps({k: state[k] for k in ("tokens", "seconds", "factor", "arguments")}, indent=1) + "\n"
    )
    print(f"{args.export}: {model.num_parameters():,} parameters, {state['tokens']:,} tokens seen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bundled_model"))
    parser.add_argument("--export", type=Path, help="write the last checkpoint to this folder, and train nothing")
    parser.add_argument("--fresh", action="store_true", help="ignore a checkpoint in the work folder")
    parser.add_argument("--tokens", type=lambda s: int(float(s)), default=12_000_000)
    parser.add_argument("--deadline-minutes", type=float, default=math.inf, help="decay and end within this time")
    parser.add_argument("--decay", type=float, default=0.25, help="fraction of the run in which the rate falls to zero")
    parser.add_argument("--warmup-tokens", type=int, default=200_000)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--micro-tokens", type=int, default=4096, help="tokens in one forward pass")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--decay-seq", type=int, default=1024, help="window length in the decay")
    parser.add_argument("--muon-lr", type=float, default=6e-3)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="autocast; slower than float32 where the CPU has no AMX",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--monitor-every", type=int, default=50, help="steps between held-out losses")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    export(args) if args.export else train(args)


if __name__ == "__main__":
    main()
