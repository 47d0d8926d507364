"""`check_format`: which properties are checked on which tensors, and the error that lists those that fail."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from formats import BrokenContract, Format, contract, find
from formats.contract import Property, expect, failure
from formats.registry import Entry

from . import cases, encoding, harness
from .cases import Case

BLOCKS = (64, 1, 17, 100, 4096)  #: the first has the most checks; the last exceeds most tensors

#: properties of any tensor
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
#: the tensors on which each property is checked
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
    """Returns the properties that `check_format` checks: their descriptions, by name."""
    asked = {prop.__name__: prop.__doc__ or "" for prop in (is_made, refuses_blocks, *ASKED)}
    return {name: " ".join(words.split()) for name, words in asked.items()}


def check_format(f: Format | type[Format] | str) -> None:
    """Check every property of a format.

    f: a format, which is checked as it is; or a class, a registered name or `module.Class`, which is checked with several
    block sizes, with and without double quantization. A class may refuse block sizes with a ValueError, but not 64 unless
    its block size is `fixed`.

    Raises BrokenContract, an AssertionError and a ValueError. It has a line for each property that fails, with the first
    tensor on which it fails, and what was expected.
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
    """Make the format with each block size that it accepts, with and without double quantization."""
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
    """The constructor takes block and dq by name, and every other argument has a default."""
    for dq in (False, True):
        entry.make(block=BLOCKS[0], dq=dq)


def refuses_blocks(entry: Entry, _: None) -> None:
    """A block that is not a positive integer raises a ValueError."""
    for block in (0, -3, 7.5, "64", True, None):
        try:
            entry.make(block=block, dq=False)
        except ValueError:
            continue
        expect("block" in entry.cls.fixed, f"block={block!r} is taken", "a ValueError")
