"""Numbers and names as all reports write them."""

import math
import re
from collections.abc import Sequence

from qbench.system.messages import sanitize

SIGNIFICANT = 0.05  #: p values below it are called distinguishable
MAX_NAMES = 6  #: names in a list before it is cut
_MARKDOWN = re.compile(
    r"[\\`*\[\]<|$~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)"  # anywhere
    r"|^(?:>|#+(?=\s|$)|[-+=]+(?=\s|$))|(?<=^\d)[.)](?=\s|$)"  # at the start of a line
)

UNTUNED = "none"  #: `tune.method` of a run without a fine-tune
METHODS = {
    UNTUNED: "untuned", "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA", "ia3": "(IA)³", "prefix": "prefix tuning",
    "p_tuning": "P-tuning", "full": "full fine-tuning",
}  # fmt: skip
INITS = {"default": "B = 0", "loftq": "LoftQ", "pissa": "PiSSA"}
STAGES = ("baseline", "quantized", "initial", "tuned")  #: the stages of a run that are scored, in order
#: names of rows, by kind of merge
MERGED = {"adapters": "A, B packed", "16bit": "merged", "requantized": "requantized"}


def escape_markdown(text: str) -> str:
    """The text as Markdown that renders as the text itself, without a link, HTML, a formula or a table cell."""
    return _MARKDOWN.sub(r"\\\g<0>", text)


def format_number(value: float | None, form: str) -> str:
    """The number in digits, or as a power of ten from 10¹² on. None stands for a number that is not finite."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e12:
        form = ".3g"
    return f"{value:{form}}".replace("-", "−")


def plus_minus(value: float | None, stderr: float | None, form: str) -> str:
    """`20.09±0.40`; the value alone if the error is zero or unknown."""
    text = format_number(value, form)
    return f"{text}±{format_number(stderr, form.lstrip('+'))}" if stderr else text


def relative_change(delta: float) -> float:
    """The relative change of a perplexity whose logarithm changes by `delta`; infinite if floats overflow."""
    try:
        return math.expm1(delta)
    except OverflowError:
        return math.inf


def shorten(name: str) -> str:
    """A name from a user or a file, made printable and cut to fit in a table or a figure."""
    return sanitize(name, 60)


def recipe_name(config: dict) -> str:
    """Format, double quantization and block of a run: `nf4 + dq, block 64`."""
    if config["format"]["name"] == "none":
        return "16 bit"
    return f"{shorten(config['format']['name'])}{' + dq' if config['dq'] else ''}, block {config['block']}"


def method_name(tune: dict) -> str:
    """The fine-tuning method: `LoRA`."""
    return METHODS.get(tune["method"], shorten(tune["method"]))


def init_name(init: str) -> str:
    """The initialization of LoRA: `B = 0`, `LoftQ`."""
    return INITS.get(init, shorten(init))


def merged_scores(metrics: dict) -> dict[str, dict]:
    """Scores of packed or merged adapters by kind, in the metrics of a run. Unknown kinds are left out."""
    return {kind: scores for kind, scores in metrics.get("merged", {}).items() if kind in MERGED}


def join_names(names: Sequence[str], separator: str = ", ") -> str:
    """The first MAX_NAMES names, and the number of the others: `a, b and 3 more`."""
    more = f"{separator.strip(', ')} and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return separator.join(names[:MAX_NAMES]) + more


def count(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
