"""The plan beside the memory table of QLoRA (arXiv 2305.14314): where they agree, and why where they do not.

The table is a secondary copy of the paper's figure: batch 1, sequence 512, gradient checkpointing, rank 64 on every linear
layer, NF4 with double quantization. Its lines are in MiB. This follows from the optimizer's: 8 bytes a parameter of
adapters on four layers d → d and on an MLP of two layers d ↔ 4d, 18·d·rank a block, give all four numbers, to the MiB. It
is thus arithmetic on a textbook's transformer, while LLaMA's MLP has three layers of some 8/3·d.

Nothing in the plan is set to agree with it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

import formats

from .count import HELD, Plan, count
from .settings import Dtypes, PlanSettings
from .shapes import find

MIB = 2**20
GPU = 24 * 10**9  # bytes, for 33B
#: MiB, the total in GB as printed
TABLE = {
    "llama-7b": {"model": 5046, "adapters": 298, "optimizer": 1152, "total": 6.9},
    "llama-13b": {"model": 8476, "adapters": 450, "optimizer": 1800, "total": 11.3},
    "llama-33b": {"model": 19302, "adapters": 897.5, "optimizer": 3510, "total": 24.7},
    "llama-65b": {"model": 37074, "adapters": 1440, "optimizer": 5760, "total": 45.0},
}
SETTINGS = PlanSettings(
    format=formats.get("nf4", dq=True),
    rank=64,
    batch=1,
    seq=512,
    checkpointing=True,
    optimizer="paged_adamw",
    dtype=Dtypes(adapters="bfloat16"),
)


@dataclass(frozen=True)
class Comparison:
    """paper, ours: MiB, by line. plan: with the paper's settings. undoubled, wider: MiB that the model would have more
    with fp32 scales instead of double-quantized ones, and with embeddings and head in 32 bits.
    """

    name: str
    paper: dict[str, float]
    ours: dict[str, float]
    plan: Plan
    undoubled: float
    wider: float

    def off(self, line: str) -> float:
        return self.ours[line] / self.paper[line] - 1

    @property
    def unnamed(self) -> float:
        """MiB of the paper's model line that neither explains."""
        return self.paper["model"] - self.ours["model"] - self.undoubled - self.wider


def compare() -> list[Comparison]:
    found = []
    for name, printed in TABLE.items():
        plan = count(find(name), SETTINGS)
        other = count(plan.shape, SETTINGS.but(format=formats.get("nf4")))
        lines, plainer = plan.moments[plan.peak], other.moments[other.peak]
        model = sum(lines[key] for key in HELD)
        ours = {
            "model": model / MIB,
            "adapters": lines["adapters"] / MIB,
            "optimizer": plan.paged / MIB,
            "total": (plan.needed + plan.paged) / MIB,
        }
        undoubled = (plainer["scales"] - lines["scales"]) / MIB
        wider = (lines["embeddings"] + lines["head"]) / MIB  # in 32 bits they are twice that
        paper = {**printed, "total": printed["total"] * 1024}
        found.append(Comparison(name, paper, ours, plan, undoubled, wider))
    return found


def textbook(name: str, rank: int = 64) -> int:
    """Parameters of adapters on a block of four layers d → d and an MLP of two layers d ↔ 4d."""
    config = find(name).config
    return 18 * config.hidden_size * rank * config.num_hidden_layers


def show(found: list[Comparison], console: Console) -> None:
    console.print("The plan beside QLoRA's memory table (arXiv 2305.14314), MiB", style="bold")
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, head in enumerate(("", "line", "paper", "plan", "difference")):
        table.add_column(head, justify="right" if i > 1 else "left", no_wrap=True)
    for one in found:
        for i, line in enumerate(one.paper):
            mark = " *" if abs(one.off(line)) > 0.1 else "  "
            cells = f"{one.paper[line]:,.0f}", f"{one.ours[line]:,.0f}", f"{100 * one.off(line):+.1f}%{mark}"
            table.add_row("" if i else one.name, line, *cells)
    console.print(table)
    console.print()
    for sentence in explain(found):
        console.print(sentence)


def explain(found: list[Comparison]) -> list[str]:
    """Why lines differ, a sentence or two each; the starred ones are beyond 10%."""

    def each(value: Callable[[Comparison], float]) -> str:
        return ", ".join(f"{value(one):,.0f}" for one in found)

    three = next(one for one in found if one.name == "llama-33b")
    fits = []
    for adapters in ("bfloat16", "float32"):
        for optimizer in ("adamw", "paged_adamw"):
            settings = SETTINGS.but(optimizer=optimizer, dtype=Dtypes(adapters=adapters), gpu=GPU)
            margin = GPU - count(three.plan.shape, settings).needed
            fits.append(f"{margin / 1e9:+.2f} GB with {optimizer} and {adapters} adapters".replace("-", "−"))
    return [
        "model: the plan is the bytes of 4.127 bits a linear weight, embeddings and head in 16 bits. The paper's line has"
        f" {each(lambda one: one.paper['model'] - one.ours['model'])} MiB more. Scales in fp32 rather than double"
        f" quantized would add {each(lambda one: one.undoubled)}; embeddings and head in 32 bits"
        f" {each(lambda one: one.wider)}; there remain {each(lambda one: one.unnamed)} MiB that it does not name, of the"
        " order of a CUDA context.",
        "adapters, optimizer: the paper's are 2 and 8 bytes a parameter of adapters on a block with two MLP layers of 4d:"
        f" {each(lambda one: 8 * textbook(one.name) / MIB)} MiB of optimizer, to the MiB; its adapters at 7B and 33B are"
        " 10 and 20 MiB above that. LLaMA's block has three MLP layers and so"
        f" {100 * (three.plan.trainable / textbook(three.name) - 1):.0f}% more such parameters, which the plan counts.",
        "total: the paper's, printed in GB, is read as GiB, as its lines are MiB. It adds weight gradients and input"
        " gradients to them. The plan's has no input gradients as such but what is alive at the worst moment, and adds the"
        f" CUDA context and {SETTINGS.fragmentation_percent:g}% for fragmentation.",
        f"33B on 24 GB, margin: {'; '.join(fits)}.",
    ]


def plain(found: list[Comparison]) -> list[dict]:
    return [{"model": one.name, "unit": "MiB", "paper": one.paper, "plan": one.ours} for one in found]
