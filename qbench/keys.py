"""What each key of `run`, `quantize` and `plan` accepts. --help shows it, and settings from Python are checked too.

Nothing slow is imported, so a mistake is reported before PyTorch is loaded. The meaning and the default of each key are in
conf/.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from qbench.errors import InputError, byte_count

METHODS = ("lora", "dora", "rslora", "ia3", "prefix", "p_tuning", "full")
OPTIMIZERS = ("adamw", "adam", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
PAGED = OPTIMIZERS[-2:]  #: optimizers that take a budget
TRACKERS = ("tensorboard", "mlflow", "wandb")
DTYPES = ("bfloat16", "float16", "float32")
SMALLEST_PAGE = 4096  #: bytes; holds one grain of the widest optimizer states, two moments in fp64
LARGEST = 2**31 - 1  #: the largest index of 32 bits
ENORMOUS = 1e30  #: practically infinite, but still finite in float32


@dataclass(frozen=True)
class Accepted:
    """What a key accepts.

    words: the accepted values, for messages. allows: whether a value is accepted. names: whether `words` is a list of
    names. text: whether values are text, even if they look like numbers. choices: names for completion.
    """

    words: str
    allows: Callable[[object], bool]
    names: bool = False
    text: bool = False
    choices: tuple[str, ...] = ()

    def check(self, key: str, value: object) -> None:
        """Raise InputError if `value` is not accepted."""
        if not self.allows(value):
            problem = f"unknown; accepted: {self.words}" if self.names else f"not accepted; {self.words} is"
            raise InputError(f"{key}: {shown(value)} is {problem}")

    def __or__(self, other: "Accepted") -> "Accepted":
        def either(value: object) -> bool:
            return self.allows(value) or other.allows(value)

        names = self.names and other.names
        joint = ", " if names else " or "
        choices = tuple(dict.fromkeys((*self.choices, *other.choices)))
        return Accepted(f"{self.words}{joint}{other.words}", either, names, self.text or other.text, choices)


def shown(value: object) -> str:
    """A value for a message, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _integer(least: int, most: int) -> Accepted:
    def allows(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Accepted(f"an integer of at least {least}, at most {most}", allows)


def _number(least: float, most: float, *, above: bool = False, below: bool = False) -> Accepted:
    """A number from `least` to `most`. above, below: exclude `least`, `most`."""

    def allows(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (least < value if above else least <= value) and (value < most if below else value <= most)

    lower, upper = "above" if above else "of at least", "below" if below else "at most"
    return Accepted(f"a number {lower} {least:g}, {upper} {most:g}", allows)


def _one_of(names: Iterable[str]) -> Accepted:
    known = tuple(names)
    return Accepted(", ".join(known), lambda value: isinstance(value, str) and value in known, True, choices=known)


def _matching(words: str, pattern: str, choices: tuple[str, ...] = ()) -> Accepted:
    def allows(value: object) -> bool:
        return isinstance(value, str) and bool(re.fullmatch(pattern, value))

    return Accepted(words, allows, names=True, choices=choices)


def _text(words: str) -> Accepted:
    return Accepted(words, lambda value: isinstance(value, str) and bool(value) and "\0" not in value, text=True)


def _list_of(item: Accepted, words: str) -> Accepted:
    def allows(value: object) -> bool:
        return isinstance(value, list | tuple) and all(map(item.allows, value))

    return Accepted(words, allows, item.names, item.text, item.choices)


def _bytes(least: int, examples: str = "67108864, 64MB or 1.5GiB") -> Accepted:
    def allows(value: object) -> bool:
        try:
            return byte_count("", value, least) <= 2**63
        except (InputError, ValueError):  # such as for an integer of more than 4,300 digits
            return False

    return Accepted(f"bytes, {least} or more, such as {examples},", allows)


NULL = Accepted("null", lambda value: value is None, names=True, choices=("null",))
FLAG = Accepted("true or false", lambda value: isinstance(value, bool), choices=("true", "false"))
BLOCK = _integer(1, LARGEST)
COUNT = _integer(1, 1_000_000)
DTYPE = _one_of(DTYPES)
TASK = _text("a task")
LAYER = _text("all, the end of a layer's name")

#: python -m qbench
RUN: dict[str, Accepted] = {
    "block": BLOCK,
    "dq": FLAG,
    "seed": _integer(0, 2**32 - 1),  # NumPy's range
    "device": _matching("auto, cpu, cuda, cuda:N", r"auto|cpu|cuda(:\d{1,3})?", ("auto", "cpu", "cuda")),
    "timeout": NULL | _number(0, 10**8, above=True),
    "track": _one_of(TRACKERS) | _list_of(_one_of(TRACKERS), "a list of them") | NULL,
    "model.path": NULL | _text("a folder, a GGUF file or a hub id owner/name"),
    "model.dtype": _one_of(("auto", *DTYPES)),
    "model.revision": NULL | _text("a branch, a tag or a commit"),
    "model.trust_remote_code": FLAG,
    "data.path": _text("a file, kjv or docs"),
    "data.seq": _one_of(["auto"]) | _integer(2, 10_000_000),
    "eval.tokens": _integer(1, 1_000_000_000),
    "eval.tasks": TASK | _list_of(TASK, "a list of tasks, such as [qbench_docs,my_tasks],"),
    "eval.limit": NULL | _integer(1, 1_000_000_000),
    "eval.batch": COUNT,
    "tune.method": _one_of((*METHODS, "none")),
    "tune.steps": _integer(1, 10_000_000),
    "tune.batch": COUNT,
    "tune.accumulate": COUNT,
    "tune.group_by_length": FLAG,
    "tune.checkpointing": FLAG,
    "tune.rank": COUNT,
    "tune.alpha": _number(0, 1_000_000, above=True),
    "tune.dropout": _number(0, 1, below=True),
    "tune.init": _one_of(("default", "loftq", "pissa")),
    "tune.init_rounds": _integer(1, 1000),
    "tune.virtual_tokens": COUNT,
    "tune.lr": _number(0, ENORMOUS, above=True),
    "tune.schedule": _one_of(("constant", "cosine")),
    "tune.warmup": _integer(0, 10_000_000),
    "tune.weight_decay": _number(0, 1000),
    "tune.clip": _number(0, ENORMOUS, above=True),
    "tune.optimizer": _one_of(OPTIMIZERS),
    "tune.optimizer_budget": NULL | _bytes(1),
    "tune.optimizer_page": _bytes(SMALLEST_PAGE),
    "tune.merge": FLAG,
    "tune.adapter_format": NULL | _text("the name of a format"),
    "tune.adapter_block": BLOCK,
}

#: python -m qbench quantize
QUANTIZE: Mapping[str, Accepted] = {
    "block": BLOCK,
    "dq": FLAG,
    "model.path": NULL | _text("a folder"),
    "layout": _one_of(("qbench", "bitsandbytes")),
    "out": NULL | _text("a new or empty folder"),
}

#: the keys of a run that affect the memory of a training step; a plan accepts the others, but ignores them
MEMORY_KEYS = (
    "block",
    "dq",
    "device",
    "model.path",
    "model.dtype",
    "model.revision",
    "model.trust_remote_code",
    "data.seq",
    "tune.method",
    "tune.batch",
    "tune.accumulate",
    "tune.checkpointing",
    "tune.rank",
    "tune.dropout",
    "tune.optimizer",
    "tune.optimizer_budget",
    "tune.optimizer_page",
)
#: python -m qbench plan: the keys of a run, and more
PLAN: Mapping[str, Accepted] = RUN | {
    "model.path": NULL | _text("a name, a folder, a config.json or a hub id owner/name"),
    "gpu": NULL | _bytes(10**6, "24GB, 24GiB or 800MB"),
    "targets": LAYER | _list_of(LAYER, "a list of them, such as [q_proj,v_proj],"),
    "attention": _one_of(("sdpa", "flash", "eager")),
    "dtype.compute": NULL | DTYPE,
    "dtype.embeddings": NULL | DTYPE,
    "dtype.head": NULL | DTYPE,
    "dtype.norms": NULL | DTYPE,
    "dtype.adapters": DTYPE,
    "dtype.gradients": NULL | DTYPE,
    "dtype.states": DTYPE,
    "context": NULL | _bytes(0, "500MB"),
    "fragmentation": NULL | _number(0, 100, below=True),
    "sweep": FLAG,
    "blocks": _list_of(BLOCK, "a list of integers of at least 1, such as [32,64],"),
    "paper": FLAG,
    "check": FLAG,
    "figure": NULL | _text("a file"),
    "json": NULL | _text("a file"),
}
#: old keys of a plan, and the keys of a run that replaced them
PLAN_RENAMED = {
    "method": "tune",
    "rank": "tune.rank",
    "batch": "tune.batch",
    "accumulate": "tune.accumulate",
    "seq": "data.seq",
    "checkpointing": "tune.checkpointing",
    "optimizer": "tune.optimizer",
    "dropout": "tune.dropout",
}


def check(table: Mapping[str, Accepted], values: Mapping[str, object], prefix: str = "") -> None:
    """Raise InputError if a value is not accepted. prefix: what the names in `values` lack to be keys of `table`."""
    for name, value in values.items():
        table[f"{prefix}{name}"].check(f"{prefix}{name}", value)


def leaves(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """The values of a nested config, by dotted key."""
    values: dict[str, object] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        values |= leaves(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return values


def unknown(key: str, table: Mapping[str, Accepted]) -> str:
    """The message for a key that is not in `table`. It names the most similar keys, else those of the same group."""
    within = [known for known in table if known.startswith(f"{key}.")]
    if within:
        return f"{key} is a group of keys; accepted: {', '.join(within)}"
    last = key.rpartition(".")[2]
    same = [known for known in table if known.rpartition(".")[2] == last]
    near = same or get_close_matches(key, table, 1, 0.7)
    if near:
        return f"{key} is unknown; did you mean {' or '.join(near)}?"
    group = key.rpartition(".")[0]
    beside = [known for known in table if group and known.startswith(f"{group}.")]
    return f"{key} is unknown; accepted: {', '.join(beside or (k for k in table if '.' not in k))}; --help explains all"


def check_paging(budget: int | str | None, page: int | str) -> tuple[int | None, int]:
    """The budget of a paged optimizer and its page, in bytes. Raises InputError if the budget is less than a page."""
    page_bytes = byte_count("tune.optimizer_page", page, SMALLEST_PAGE)
    if budget is None:
        return None, page_bytes
    budget_bytes = byte_count("tune.optimizer_budget", budget)
    if budget_bytes < page_bytes:
        raise InputError(
            f"tune.optimizer_budget: {budget!r} is not accepted; null or at least one page, tune.optimizer_page={page}"
        )
    return budget_bytes, page_bytes
