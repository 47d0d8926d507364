"""Which properties are asked of which formats, on which tensors; and what is said of those that do not hold."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from formats import BrokenContract, Format, contract, find
from formats.contract import Property, expect, failure
from formats.registry import Entry

from . import cases, encoding, harness
from .cases import Case

BLOCKS = (64, 1, 17, 100, 4096)  #: the usual one, which is asked most; one weight; odd ones; beyond most tensors

#: what is asked of any tensor
ANY: tuple[Property, ...] = (
    contract.table,
    contract.round_trip,
    contract.counted,
    contract.declared,
    contract.zeros,
    contract.finite,
    encoding.deterministic,
    encoding.layout_free,
    encoding.coded,
    encoding.scaled,
    encoding.nearest,
    encoding.idempotent,
    encoding.as_the_reference,
)
#: what is asked of which tensors
ASKED: dict[Property, Callable[[], Iterable[Case]]] = {
    **dict.fromkeys((contract.naming, contract.sourced, contract.width), cases.none),
    **dict.fromkeys(ANY, cases.every),
    encoding.refuses_non_finite: cases.spoiled,
    encoding.refuses_integers: cases.none,
    harness.layered: cases.matrices,
    harness.saved: cases.none,
}
ASKED_OF_OTHER_BLOCKS = dict.fromkeys(ANY, cases.shapes)


def properties() -> dict[str, str]:
    """What is asked of a format, in words, by name."""
    asked = {prop.__name__: prop.__doc__ or "" for prop in (is_made, refuses_blocks, *ASKED)}
    return {name: " ".join(words.split()) for name, words in asked.items()}


def check_format(f: Format | type[Format] | str) -> None:
    """Hold a format to every property.

    f: a format, which is asked as it is; a class, or a registered name or `module.Class`, which is asked with several
    block sizes, with and without double quantization. A class may refuse block sizes by a ValueError, but not 64 as long
    as it leaves them open.

    Raises BrokenContract, an AssertionError and a ValueError: a line for each property that does not hold, with the first
    tensor on which it does not, and what was expected.
    """
    broken: dict[str, BrokenContract] = {}
    alone = isinstance(f, Format)
    made = [f] if isinstance(f, Format) else _made(find(f) if isinstance(f, str) else Entry(f), broken)
    for fmt in made:
        label = f"block={fmt.block} dq={fmt.dq}".lower()
        asked = ASKED if alone or fmt.block == BLOCKS[0] or "block" in fmt.fixed else ASKED_OF_OTHER_BLOCKS
        for prop, inputs in asked.items():
            malformed = any(prop.__name__ in broken for prop in contract.BRIEF)
            if prop.__name__ not in broken and (prop in contract.BRIEF or not malformed):
                failures = (failure(prop, fmt, cases.within(fmt, w), f"{label}, {case}") for case, w in inputs())
                if first := next(filter(None, failures), None):
                    broken[prop.__name__] = first
    if broken:
        who = f if isinstance(f, str) else f"{f!r}" if isinstance(f, Format) else f.__qualname__
        lines = "\n  ".join([f"{who} breaks the contract of a format:", *map(str, broken.values())])
        raise BrokenContract(lines) from next(iter(broken.values())).__cause__


def _made(entry: Entry, broken: dict[str, BrokenContract]) -> Iterator[Format]:
    """The format with each block size that it takes, with and without double quantization."""
    if failed := failure(is_made, entry, None, f"block={BLOCKS[0]}"):
        broken["is_made"] = failed
        return
    made: dict[tuple[int, bool], Format] = {}
    for block in BLOCKS:
        for dq in (False, True):
            with suppress(ValueError):
                fmt = entry.make(block=block, dq=dq)
                made.setdefault((fmt.block, fmt.dq), fmt)
    yield from made.values()
    if failed := failure(refuses_blocks, entry, None, "other blocks"):
        broken["refuses_blocks"] = failed


def is_made(entry: Entry, _: None) -> None:
    """The constructor takes block and dq by their names, and nothing that has no default."""
    for dq in (False, True):
        entry.make(block=BLOCKS[0], dq=dq)


def refuses_blocks(entry: Entry, _: None) -> None:
    """A block that is no positive integer raises a ValueError."""
    for block in (0, -3, 7.5, "64", True, None):
        try:
            entry.make(block=block, dq=False)
        except ValueError:
            continue
        expect("block" in entry.cls.fixed, f"block={block!r} is taken", "a ValueError")
