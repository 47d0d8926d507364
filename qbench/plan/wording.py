"""A plan in sentences and tables, for the terminal: the answer first, every assumption last."""

from rich.console import Console
from rich.table import Table

from qbench.report import wording

from . import step
from .advice import Change
from .count import HELD, LINES, Plan
from .settings import PlanSettings

METHODS = {
    "lora": "under LoRA of rank {rank}",
    "full": "under full fine-tuning",
    "none": "when it only scores text",
}
#: where the plan's own keys mean something that their name does not say
MEANING = {
    "device": "whose kernels and optimizer loops the step runs through",
    "targets": "linear layers that carry adapters",
    "batch": "windows a step",
    "accumulate": "parts that a batch is taken in",
    "seq": "tokens a window",
    "checkpointing": "keep the inputs of the blocks, compute the rest twice",
    "attention": "sdpa, flash: no matrix of seq²; eager: one a head",
    "optimizer": "paged states may wait in host",
    "dtype.compute": "of activations and logits",
    "dtype.head": "no bytes where it is tied to the embeddings",
    "dtype.norms": "and biases",
    "dtype.states": "of the optimizer, unless it is an 8-bit one",
    "context": "bytes, of CUDA and its libraries",
    "fragmentation": "per cent of what is allocated",
}


def amount(nbytes: float, of: float) -> str:
    """Bytes in GB (10⁹), or in MB where `of`, the largest they are shown with, is below 2 GB."""
    return f"{nbytes / 1e9:,.2f} GB" if of >= 2e9 else f"{nbytes / 1e6:,.1f} MB"


def format_title(settings: PlanSettings) -> str:
    fmt = settings.format
    return wording.title({"format": {"name": fmt.name}, "dq": fmt.dq, "block": fmt.block})


def method_title(settings: PlanSettings) -> str:
    return METHODS[settings.method].format(rank=settings.rank)


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much, in a sentence."""
    settings, needed = plan.settings, amount(plan.needed, plan.needed)
    what = f"{plan.shape.name} in {format_title(settings)}, {method_title(settings)},"
    where = {"forward": "at the end of the forward", "loss": "at the loss", "step": "in the optimizer's step"}
    when = where.get(plan.peak, "in the backward")
    if settings.gpu is None:
        sentence = f"{what} needs {needed}, {when}; gpu=24GB asks whether that fits."
        return sentence + (f" {amount(plan.paged, plan.needed)} of states may be paged." if plan.paged else "")
    there, margin = amount(settings.gpu, settings.gpu), amount(abs(settings.gpu - plan.needed), settings.gpu)
    if not plan.fits:
        return f"Does not fit {there}: {what} needs {needed}, {margin} too much, {when}."
    return f"Fits {there}, with {margin} to spare: {what} needs {needed}, {when}.{_paging(plan)}"


def _paging(plan: Plan) -> str:
    if not plan.paged:
        return ""
    paged, host = amount(plan.paged, plan.needed), amount(plan.in_host, plan.needed)
    if not plan.in_host:
        return f" The {paged} of paged optimizer states fit beside it."
    return f" Of the {paged} of paged optimizer states {host} wait in host memory meanwhile."


def remedies(plan: Plan, found: list[Change]) -> list[str]:
    """What would change that it does not fit."""
    if not found:
        lines = plan.moments[plan.peak]
        frozen = amount(sum(lines[name] for name in HELD), plan.needed)
        return [f"No change of the keys below makes it fit: the weights alone take {frozen}."]
    alone = "on its own" if len(found) > 1 or " " not in found[0].words.replace(" dq=true", "") else "together"
    gpu = plan.settings.gpu
    assert gpu is not None  # that it does not fit
    said = [f"What would change that, {alone}:"]
    for change in found:
        to_spare = amount(gpu - change.plan.needed, gpu)
        said.append(f"  {change.words}: {to_spare} to spare.{_paging(change.plan)}")
    return said


def checkpointing(plan: Plan) -> str:
    """The activations, with and without gradient checkpointing."""
    settings, found = plan.settings, {}
    for on in (False, True):
        peaks = step.peaks(plan.shape, settings.but(checkpointing=on))
        found[on] = max(kinds[step.ACTIVATIONS] + kinds[step.LOGITS] for kinds in peaks.values())
    without, with_it = (amount(found[on], plan.needed) for on in (False, True))
    return f"Activations and logits are at most {without} without gradient checkpointing, {with_it} with it."


def show(plan: Plan, found: list[Change], console: Console) -> None:
    settings = plan.settings
    console.print(verdict(plan), style="bold")
    if not plan.fits:
        for line in remedies(plan, found):
            console.print(line)
    console.print()
    linear = f"{plan.linear / 1e9:,.3f}·10⁹" if plan.linear >= 1e9 else f"{plan.linear / 1e6:,.2f}·10⁶"
    share = f"; {100 * plan.trainable / plan.parameters:.2f}% as many parameters are trained" if plan.trainable else ""
    share = "; all are trained" if settings.method == "full" else share
    console.print(f"{plan.bits:.3f} bits for each of {linear} weights in linear layers, scales included{share}.")
    if others := plan.moments[plan.peak]["others"]:
        console.print(
            f"Weights in no linear layer, such as the experts of a mixture, are in no format and carry no adapters:"
            f" {amount(others, plan.needed)}."
        )
    if settings.trains:
        console.print(checkpointing(plan))
    console.print()
    console.print(_moments(plan))
    console.print("\n* the peak. What is assumed, each a key:\n", style="dim")
    console.print(_assumptions(plan))


def _moments(plan: Plan) -> Table:
    divisor, digits, unit = (1e9, 2, "GB, 10⁹ bytes") if plan.needed >= 2e9 else (1e6, 1, "MB, 10⁶ bytes")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(unit, no_wrap=True)
    for moment in plan.moments:
        is_peak = moment == plan.peak
        style = "bold" if is_peak else None
        table.add_column(f"{moment}{'*' * is_peak}", justify="right", style=style, no_wrap=True)
    for name, words_ in LINES.items():
        cells = [lines[name] for lines in plan.moments.values()]
        if any(cells):
            table.add_row(words_, *(f"{cell / divisor:,.{digits}f}" for cell in cells))
    table.add_row("sum", *(f"{plan.total(moment) / divisor:,.{digits}f}" for moment in plan.moments), style="bold")
    return table


def assumptions(plan: Plan) -> dict[str, object]:
    """Every key and its value, what was left to the plan resolved."""
    settings = plan.settings
    skipped = {"format", "gpu", "dtype"} | ({"rank", "targets", "dropout"} if settings.method != "lora" else set())
    skipped |= set() if settings.trains else {"accumulate", "checkpointing", "optimizer"}
    found = {key: value for key, value in vars(settings).items() if key not in skipped}
    found |= {"context": settings.context_bytes, "fragmentation": settings.fragmentation_percent}
    trained = settings.dtype.adapters if settings.method == "lora" else settings.dtype.compute
    unused = {"lora": (), "full": ("adapters",), "none": ("adapters", "gradients", "states")}[settings.method]
    for name, value in vars(settings.dtype).items():
        if name in unused:
            continue
        found[f"dtype.{name}"] = value or (trained if name == "gradients" else settings.dtype.compute)
    return found


def _assumptions(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for key, value in assumptions(plan).items():
        shown = str(value).lower() if isinstance(value, bool) else f"{value:,}" if key == "context" else str(value)
        table.add_row(f"{key}={shown}", MEANING.get(key, ""))
    return table


def checked(settings: PlanSettings, expected: int, measured: int) -> str:
    """How far a plan is from the step that was taken."""
    off = 100 * (expected / measured - 1)
    return (
        f"Taken here on {settings.device}, with random weights, the step holds {amount(measured, measured)} at its peak;"
        f" the plan, without context and fragmentation, has {amount(expected, measured)}, {off:+.2f}%.".replace(
            "-", "−"
        )
    )


def show_sweep(plans: list[Plan], console: Console) -> None:
    """Which formats fit: the answer, then every one."""
    first, settings = plans[0], plans[0].settings
    largest = plans[-1].needed
    subject = f"{first.shape.name} {method_title(settings)}"
    if settings.gpu is None:
        answer = f"{subject} needs from {amount(first.needed, largest)} to {amount(largest, largest)}."
    else:
        fitting = [plan for plan in plans if plan.fits]
        answer = f"{len(fitting)} of {len(plans)} formats fit {amount(settings.gpu, settings.gpu)}: {subject}"
        if fitting:
            best = max(fitting, key=lambda plan: (plan.bits, -plan.needed))
            answer += (
                f"; the one with most bits is {format_title(best.settings)},"
                f" {amount(settings.gpu - best.needed, settings.gpu)} to spare."
            )
        else:
            short = amount(first.needed - settings.gpu, settings.gpu)
            answer += f"; the smallest, {format_title(first.settings)}, is {short} too large."
    console.print(answer, style="bold")
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("formats")
    for head in ["dq", "block", "bits/w", "needed"] + ["margin"] * (settings.gpu is not None):
        table.add_column(head, justify="right", no_wrap=True)
    for alike in groups(plans):
        fmt, plan = alike[0].settings.format, alike[0]
        cells = ["", ""] if fmt.name == "none" else ["yes" if fmt.dq else "no", str(fmt.block)]
        cells += [f"{plan.bits:.3f}", amount(plan.needed, largest)]
        if plan.margin is not None:
            cells.append(("+" if plan.margin >= 0 else "−") + amount(abs(plan.margin), largest))
        style = None if plan.fits else "dim"
        table.add_row(format_names(alike), *cells, style=style)
    console.print(table)
    console.print("\nWhat is assumed, each a key:\n", style="dim")
    console.print(_assumptions(first))


def groups(plans: list[Plan]) -> list[list[Plan]]:
    """The plans of a sweep, those together whose formats have the same block and, to a thousandth, the same bits."""
    found: dict[tuple, list[Plan]] = {}
    for plan in plans:
        fmt = plan.settings.format
        found.setdefault((fmt.block, fmt.dq, f"{plan.bits:.3f}", fmt.name == "none"), []).append(plan)
    return list(found.values())


def format_names(alike: list[Plan]) -> str:
    names = (plan.settings.format.name for plan in alike)
    return ", ".join("16 bit" if name == "none" else name for name in names)


def plain(plan: Plan) -> dict:
    """A plan as JSON holds it, in bytes."""
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
