"""Compares the plan with the memory table of QLoRA (arXiv 2305.14314), and explains where they differ.

The numbers are a copy of a figure of the paper: batch 1, sequence 512, gradient checkpointing, rank 64 on every linear
layer, NF4 with double quantization. Its lines are in MiB. The optimizer's line shows how they were computed: 8 bytes per
adapter parameter, with adapters on four layers d → d and an MLP of two layers d ↔ 4d. That is 18·d·rank parameters a
block, and gives all four numbers to the MiB. So the table is arithmetic on a textbook's transformer, while LLaMA's MLP has
three layers of about 8/3·d.

Nothing in the plan is tuned to agree with the table.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

import formats

from .count import HELD, Plan, count_memory
from .settings import Dtypes, PlanSettings
from .shapes import find_shape

MIB = 2**20
GPU = 24 * 10**9  # bytes, for 33B
#: the paper's lines in MiB, and its total in GB, as printed
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
    """The paper's lines of a model, and the plan's.

    paper, ours: MiB, by line. plan: with the paper's settings. fp32_scales, fp32_embeddings: MiB that the model would take
    in addition without double quantization, and with embeddings and head in 32 bits.
    """

    name: str
    paper: dict[str, float]
    ours: dict[str, float]
    plan: Plan
    fp32_scales: float
    fp32_embeddings: float

    def difference(self, line: str) -> float:
        """The plan's line divided by the paper's, minus 1."""
        return self.ours[line] / self.paper[line] - 1

    @property
    def unexplained(self) -> float:
        """MiB of the paper's model line that neither scales nor embeddings explain."""
        return self.paper["model"] - self.ours["model"] - self.fp32_scales - self.fp32_embeddings


def compare_with_paper() -> list[Comparison]:
    """A comparison for each model of the table."""
    comparisons = []
    for name, printed in TABLE.items():
        plan = count_memory(find_shape(name), SETTINGS)
        without_dq = count_memory(plan.shape, SETTINGS.replace(format=formats.get("nf4")))
        lines, lines_without_dq = plan.moments[plan.peak], without_dq.moments[without_dq.peak]
        ours = {
            "model": sum(lines[key] for key in HELD) / MIB,
            "adapters": lines["adapters"] / MIB,
            "optimizer": plan.paged / MIB,
            "total": (plan.needed + plan.paged) / MIB,
        }
        fp32_scales = (lines_without_dq["scales"] - lines["scales"]) / MIB
        fp32_embeddings = (lines["embeddings"] + lines["head"]) / MIB  # in 32 bits they take twice as much
        paper = {**printed, "total": printed["total"] * 1024}
        comparisons.append(Comparison(name, paper, ours, plan, fp32_scales, fp32_embeddings))
    return comparisons


def textbook_parameters(name: str, rank: int = 64) -> int:
    """Parameters of adapters on blocks of four layers d → d and an MLP of two layers d ↔ 4d."""
    config = find_shape(name).config
    return 18 * config.hidden_size * rank * config.num_hidden_layers


def print_comparisons(comparisons: list[Comparison], console: Console) -> None:
    """Print the table, and why its lines differ."""
    console.print("The plan compared with QLoRA's memory table (arXiv 2305.14314), MiB", style="bold")
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, head in enumerate(("", "line", "paper", "plan", "difference")):
        table.add_column(head, justify="right" if i > 1 else "left", no_wrap=True)
    for comparison in comparisons:
        for i, line in enumerate(comparison.paper):
            difference = comparison.difference(line)
            mark = " *" if abs(difference) > 0.1 else "  "
            cells = f"{comparison.paper[line]:,.0f}", f"{comparison.ours[line]:,.0f}", f"{100 * difference:+.1f}%{mark}"
            table.add_row("" if i else comparison.name, line, *cells)
    console.print(table)
    console.print()
    for sentence in explain(comparisons):
        console.print(sentence)


def explain(comparisons: list[Comparison]) -> list[str]:
    """Why lines differ, a paragraph for each. The table has a star where the difference is beyond 10%."""

    def each(value: Callable[[Comparison], float]) -> str:
        return ", ".join(f"{value(comparison):,.0f}" for comparison in comparisons)

    largest_on_24gb = next(comparison for comparison in comparisons if comparison.name == "llama-33b")
    shape = largest_on_24gb.plan.shape
    more_parameters = largest_on_24gb.plan.trainable / textbook_parameters(largest_on_24gb.name) - 1
    margins = []
    for adapters in ("bfloat16", "float32"):
        for optimizer in ("adamw", "paged_adamw"):
            settings = SETTINGS.replace(optimizer=optimizer, dtype=Dtypes(adapters=adapters), gpu=GPU)
            margin = GPU - count_memory(shape, settings).needed
            margins.append(f"{margin / 1e9:+.2f} GB with {optimizer} and {adapters} adapters".replace("-", "−"))
    return [
        "model: the plan is the bytes of 4.127 bits a linear weight, embeddings and head in 16 bits. The paper's line has"
        f" {each(lambda c: c.paper['model'] - c.ours['model'])} MiB more. Scales in fp32 rather than double"
        f" quantized would add {each(lambda c: c.fp32_scales)}; embeddings and head in 32 bits"
        f" {each(lambda c: c.fp32_embeddings)}. That leaves {each(lambda c: c.unexplained)} MiB unexplained,"
        " about the size of a CUDA context.",
        "adapters, optimizer: the paper's are 2 and 8 bytes per adapter parameter on a block with two MLP layers of 4d:"
        f" {each(lambda c: 8 * textbook_parameters(c.name) / MIB)} MiB of optimizer, to the MiB; its adapters at 7B"
        f" and 33B are 10 and 20 MiB above that. LLaMA's block has three MLP layers and so {100 * more_parameters:.0f}%"
        " more such parameters, which the plan counts.",
        "total: the paper prints GB, which are read as GiB here, as its lines are MiB. It adds up lines for weight"
        " gradients and input gradients. The plan has no line for input gradients: it counts what is alive at the worst"
        f" moment, and adds the CUDA context and {SETTINGS.fragmentation_percent:g}% for fragmentation.",
        f"33B on 24 GB, margin: {'; '.join(margins)}.",
    ]


def to_json(comparisons: list[Comparison]) -> list[dict]:
    """The comparisons as `json=` writes them."""
    return [{"model": c.name, "unit": "MiB", "paper": c.paper, "plan": c.ours} for c in comparisons]
