"""A plan in sentences and tables, for the terminal. The answer comes first, the assumptions last."""

from rich.console import Console
from rich.table import Table

from qbench import keys
from qbench.report import wording
from qbench.settings import FULL

from . import step
from .advice import Remedy
from .count import HELD, LINES, Plan
from .settings import PlanSettings, key_of

METHODS = {
    "lora": "under LoRA of rank {rank}",
    "dora": "under DoRA of rank {rank}",
    "rslora": "under rsLoRA of rank {rank}",
    "full": "under full fine-tuning",
    "none": "when it only scores text",
}
#: explains the keys whose names are not clear
MEANING = {
    "device": "the step uses its kernels and optimizer loops",
    "targets": "linear layers that carry adapters",
    "tune.batch": "windows a step",
    "tune.accumulate": "parts of a batch, one after the other",
    "data.seq": "tokens a window",
    "tune.checkpointing": "keep block inputs, compute the rest twice",
    "attention": "sdpa, flash: no matrix of seq²; eager: one a head",
    "tune.optimizer": "paged states may wait in host memory",
    "tune.optimizer_budget": "bytes of states on the device",
    "dtype.compute": "of activations and logits",
    "dtype.head": "no bytes where it is tied to the embeddings",
    "dtype.norms": "and biases",
    "dtype.states": "of the optimizer, unless it is an 8-bit one",
    "context": "bytes, of CUDA and its libraries",
    "fragmentation": "per cent of the allocated bytes",
}
#: settings that only a low-rank fine-tune has, those that any fine-tune has, and those of paged optimizers
LOW_RANK_ONLY = {"rank", "targets", "dropout"}
TRAINING_ONLY = {"batch", "accumulate", "checkpointing", "optimizer"}
PAGED_ONLY = {"optimizer_budget", "optimizer_page"}


def format_bytes(nbytes: float, largest: float) -> str:
    """Bytes in GB (10⁹), or in MB if the largest number shown with them is below 2 GB."""
    return f"{nbytes / 1e9:,.2f} GB" if largest >= 2e9 else f"{nbytes / 1e6:,.1f} MB"


def format_title(settings: PlanSettings) -> str:
    fmt = settings.format
    return wording.recipe_name({"format": {"name": fmt.name}, "dq": fmt.dq, "block": fmt.block})


def method_title(settings: PlanSettings) -> str:
    return METHODS[settings.method].format(rank=settings.rank)


def verdict(plan: Plan) -> str:
    """Whether the step fits, and by how much, in a sentence."""
    settings, needed = plan.settings, format_bytes(plan.needed, plan.needed)
    subject = f"{plan.shape.name} in {format_title(settings)}, {method_title(settings)},"
    moments = {"forward": "at the end of the forward", "loss": "at the loss", "step": "in the optimizer's step"}
    when = moments.get(plan.peak, "in the backward")
    if settings.gpu is None:
        sentence = f"{subject} needs {needed}, {when}; gpu=24GB asks whether that fits."
        return sentence + (f" {format_bytes(plan.paged, plan.needed)} of states may be paged." if plan.paged else "")
    there, margin = (
        format_bytes(settings.gpu, settings.gpu),
        format_bytes(abs(settings.gpu - plan.needed), settings.gpu),
    )
    if not plan.fits:
        return f"Does not fit {there}: {subject} needs {needed}, {margin} too much, {when}."
    return f"Fits {there}, with {margin} to spare: {subject} needs {needed}, {when}.{_describe_paging(plan)}"


def _describe_paging(plan: Plan) -> str:
    """Where the states of a paged optimizer are, and the budget that a run needs to put them there."""
    if not plan.paged:
        return ""
    paged, host = format_bytes(plan.paged, plan.needed), format_bytes(plan.in_host, plan.needed)
    if plan.settings.optimizer_budget is not None:
        return f" Beyond the budget {host} of optimizer states wait in host memory."
    if not plan.in_host:
        return f" The {paged} of paged optimizer states fit beside it."
    _, page = keys.check_paging(None, plan.settings.optimizer_page)
    budget = max(plan.paged - plan.in_host, page) // 2**20
    return f" Of the {paged} of paged optimizer states {host} wait in host memory: tune.optimizer_budget={budget}MiB."


def describe_remedies(plan: Plan, remedies: list[Remedy]) -> list[str]:
    """The changes that would make a plan fit, a line each."""
    if not remedies:
        lines = plan.moments[plan.peak]
        frozen = format_bytes(sum(lines[name] for name in HELD), plan.needed)
        return [f"No change of the keys below makes it fit: the weights alone take {frozen}."]
    single = " " not in remedies[0].arguments.replace(" dq=true", "")
    gpu = plan.settings.gpu
    assert gpu is not None  # without one every plan fits
    subject = "Each of these" if len(remedies) > 1 else "This" if single else "These together"
    lines_of_text = [f"{subject} would make it fit:"]
    for remedy in remedies:
        to_spare = format_bytes(gpu - remedy.plan.needed, gpu)
        lines_of_text.append(f"  {remedy.arguments}: {to_spare} to spare.{_describe_paging(remedy.plan)}")
    return lines_of_text


def describe_checkpointing(plan: Plan) -> str:
    """The memory of the activations, with and without gradient checkpointing."""
    largest = {}
    for on in (False, True):
        peaks = step.peaks(plan.shape, plan.settings.replace(checkpointing=on))
        largest[on] = max(kinds[step.ACTIVATIONS] + kinds[step.LOGITS] for kinds in peaks.values())
    without, with_it = (format_bytes(largest[on], plan.needed) for on in (False, True))
    return f"Activations and logits are at most {without} without gradient checkpointing, {with_it} with it."


def print_plan(plan: Plan, remedies: list[Remedy], console: Console) -> None:
    """Print the verdict, the remedies, the table of moments and the assumptions."""
    settings = plan.settings
    console.print(verdict(plan), style="bold")
    if not plan.fits:
        for line in describe_remedies(plan, remedies):
            console.print(line)
    console.print()
    linear = f"{plan.linear / 1e9:,.3f}·10⁹" if plan.linear >= 1e9 else f"{plan.linear / 1e6:,.2f}·10⁶"
    share = f"; {100 * plan.trainable / plan.parameters:.2f}% as many parameters are trained" if plan.trainable else ""
    share = "; all are trained" if settings.method == FULL else share
    console.print(f"{plan.bits:.3f} bits for each of {linear} weights in linear layers, scales included{share}.")
    if others := plan.moments[plan.peak]["others"]:
        console.print(
            f"Weights in no linear layer, such as the experts of a mixture, are in no format and carry no adapters:"
            f" {format_bytes(others, plan.needed)}."
        )
    if settings.trains:
        console.print(describe_checkpointing(plan))
    console.print()
    console.print(_moments_table(plan))
    console.print("\n* the peak. Assumptions, each a key:\n", style="dim")
    console.print(_assumptions_table(plan))


def _moments_table(plan: Plan) -> Table:
    """A row for each line, a column for each moment."""
    divisor, digits, unit = (1e9, 2, "GB, 10⁹ bytes") if plan.needed >= 2e9 else (1e6, 1, "MB, 10⁶ bytes")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(unit, no_wrap=True)
    for moment in plan.moments:
        is_peak = moment == plan.peak
        style = "bold" if is_peak else None
        table.add_column(f"{moment}{'*' * is_peak}", justify="right", style=style, no_wrap=True)
    for name, title in LINES.items():
        cells = [lines[name] for lines in plan.moments.values()]
        if any(cells):
            table.add_row(title, *(f"{cell / divisor:,.{digits}f}" for cell in cells))
    table.add_row("sum", *(f"{plan.total(moment) / divisor:,.{digits}f}" for moment in plan.moments), style="bold")
    return table


def assumptions(plan: Plan) -> dict[str, object]:
    """The keys that affect the plan, and their values; null is replaced by the value that the plan uses."""
    settings = plan.settings
    skipped = {"format", "gpu", "dtype"}
    skipped |= set() if settings.low_rank else LOW_RANK_ONLY
    skipped |= set() if settings.trains else TRAINING_ONLY
    skipped |= set() if settings.paged else PAGED_ONLY
    values = {key_of(name): value for name, value in vars(settings).items() if name not in skipped}
    values |= {"context": settings.context_bytes, "fragmentation": settings.fragmentation_percent}
    trained = settings.dtype.adapters if settings.low_rank else settings.dtype.compute
    unused = () if settings.low_rank else ("adapters",) if settings.trains else ("adapters", "gradients", "states")
    for name, value in vars(settings.dtype).items():
        if name not in unused:
            values[f"dtype.{name}"] = value or (trained if name == "gradients" else settings.dtype.compute)
    return values


def _assumptions_table(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for key, value in assumptions(plan).items():
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        table.add_row(f"{key}={value:,}" if key == "context" else f"{key}={text}", MEANING.get(key, ""))
    return table


def describe_check(settings: PlanSettings, expected: int, measured: int) -> str:
    """How far a plan is from a real step."""
    difference = f"{100 * (expected / measured - 1):+.2f}%".replace("-", "−")
    held, planned = format_bytes(measured, measured), format_bytes(expected, measured)
    return (
        f"A real step on {settings.device}, with random weights, holds {held} at its peak;"
        f" the plan, without context and fragmentation, has {planned}, {difference}."
    )


def print_sweep(plans: list[Plan], console: Console) -> None:
    """Print which formats fit, a table of all of them, and the assumptions."""
    console.print(sweep_verdict(plans), style="bold")
    console.print()
    console.print(_sweep_table(plans))
    console.print("\nAssumptions, each a key:\n", style="dim")
    console.print(_assumptions_table(plans[0]))


def sweep_verdict(plans: list[Plan]) -> str:
    """How many formats fit, and which of them has most bits, in a sentence. plans: the smallest first."""
    first, settings, largest = plans[0], plans[0].settings, plans[-1].needed
    subject = f"{first.shape.name} {method_title(settings)}"
    if settings.gpu is None:
        return f"{subject} needs from {format_bytes(first.needed, largest)} to {format_bytes(largest, largest)}."
    fitting = [plan for plan in plans if plan.fits]
    answer = f"{len(fitting)} of {len(plans)} formats fit {format_bytes(settings.gpu, settings.gpu)}: {subject}"
    if not fitting:
        short = format_bytes(first.needed - settings.gpu, settings.gpu)
        return f"{answer}; the smallest, {format_title(first.settings)}, is {short} too large."
    best = max(fitting, key=lambda plan: (plan.bits, -plan.needed))
    to_spare = format_bytes(settings.gpu - best.needed, settings.gpu)
    return f"{answer}; the one with most bits is {format_title(best.settings)}, {to_spare} to spare."


def _sweep_table(plans: list[Plan]) -> Table:
    largest = plans[-1].needed
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("formats")
    for head in ["dq", "block", "bits/w", "needed"] + ["margin"] * (plans[0].margin is not None):
        table.add_column(head, justify="right", no_wrap=True)
    for alike in group_by_size(plans):
        fmt, plan = alike[0].settings.format, alike[0]
        cells = ["", ""] if fmt.name == "none" else ["yes" if fmt.dq else "no", str(fmt.block)]
        cells += [f"{plan.bits:.3f}", format_bytes(plan.needed, largest)]
        if plan.margin is not None:
            cells.append(("+" if plan.margin >= 0 else "−") + format_bytes(abs(plan.margin), largest))
        table.add_row(format_names(alike), *cells, style=None if plan.fits else "dim")
    return table


def group_by_size(plans: list[Plan]) -> list[list[Plan]]:
    """The plans of a sweep in groups with the same block, dq and, to a thousandth, bits per weight."""
    groups: dict[tuple, list[Plan]] = {}
    for plan in plans:
        fmt = plan.settings.format
        groups.setdefault((fmt.block, fmt.dq, f"{plan.bits:.3f}", fmt.name == "none"), []).append(plan)
    return list(groups.values())


def format_names(alike: list[Plan]) -> str:
    names = (plan.settings.format.name for plan in alike)
    return ", ".join("16 bit" if name == "none" else name for name in names)


def to_json(plan: Plan) -> dict:
    """A plan as `json=` writes it, in bytes."""
    fmt = plan.settings.format
    return {
        "model": plan.shape.name,
        "format": {"name": fmt.name, "block": fmt.block, "dq": fmt.dq},
        "gpu": plan.settings.gpu,
        "needed": plan.needed,
        "margin": plan.margin,
        "peak": plan.peak,
        "moments": plan.moments,
        "paged": {"states": plan.paged, "in_host": plan.in_host},
        "bits_per_parameter": plan.bits,
        "parameters": {"all": plan.parameters, "linear": plan.linear, "trained": plan.trainable},
        "assumptions": assumptions(plan),
    }
