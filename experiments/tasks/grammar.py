"""Minimal pairs: two sentences that differ in one word, of which one is grammatical."""

import random
from collections.abc import Iterator

EACH = 40  #: pairs of a phenomenon

NOUNS = [
    "file", "option", "table", "value", "function", "server", "command", "package", "message", "column", "user", "script",
    "driver", "module", "system", "page", "image", "character", "window", "version", "rule", "name", "program", "line",
    "argument", "parameter", "block", "object", "key", "device", "thread", "host", "error", "header", "field", "node",
]  # fmt: skip
STATES = [
    "available", "optional", "invalid", "empty", "ignored", "required", "created automatically", "not supported",
    "very large", "used by default", "removed", "stored on disk",
]  # fmt: skip
PREPOSITIONS = ["of", "in", "for", "after", "before"]
#: base form, with an s, past tense, past participle
VERBS = [
    ("write", "writes", "wrote", "written"), ("take", "takes", "took", "taken"), ("give", "gives", "gave", "given"),
    ("choose", "chooses", "chose", "chosen"), ("see", "sees", "saw", "seen"), ("break", "breaks", "broke", "broken"),
    ("know", "knows", "knew", "known"), ("draw", "draws", "drew", "drawn"),
]  # fmt: skip
MODALS = ["can", "must", "should", "will", "may", "does not", "cannot"]


def agreement(r: random.Random) -> tuple[str, str]:
    """The verb agrees with its subject."""
    plural = r.random() < 0.5
    start = f"The {noun(r, plural)}"
    return verbs(start, r.choice([("is", "are"), ("was", "were"), ("has been", "have been")]), plural, r.choice(STATES))


def distant_agreement(r: random.Random) -> tuple[str, str]:
    """The verb agrees with its subject, not with the nearer noun, which is of the other number."""
    plural = r.random() < 0.5
    start = f"The {noun(r, plural)} {r.choice(PREPOSITIONS)} the {noun(r, not plural)}"
    return verbs(start, r.choice([("is", "are"), ("was", "were"), ("has been", "have been")]), plural, r.choice(STATES))


def determiner(r: random.Random) -> tuple[str, str]:
    """This and that precede a singular, these and those a plural."""
    plural, word = r.random() < 0.5, r.choice(NOUNS)
    start = r.choice(["See", "You can use", "The program reads", "The next section describes", "Do not change"])
    start += " " + r.choice([("this", "these"), ("that", "those")])[plural]
    good, bad = (f"{word}s", word) if plural else (word, f"{word}s")
    end = r.choice(["first", "for each request", "in the current directory", "before the next release"])
    return f"{start} {good} {end}.", f"{start} {bad} {end}."


def bare_verb(r: random.Random) -> tuple[str, str]:
    """A modal verb precedes a bare verb."""
    base, third, *_ = r.choice(VERBS)
    start, end = f"The {noun(r, plural=False)} {r.choice(MODALS)}", f"the {noun(r)}."
    return f"{start} {base} {end}", f"{start} {third} {end}"


def participle(r: random.Random) -> tuple[str, str]:
    """Has and was precede a participle, not a past tense."""
    _, _, past, done = r.choice(VERBS)
    start = f"The {noun(r, plural=False)} {r.choice(['has been', 'was', 'will be', 'had been'])}"
    end = f"by the {noun(r)}."
    return f"{start} {done} {end}", f"{start} {past} {end}"


def noun(r: random.Random, plural: bool | None = None) -> str:
    plural = r.random() < 0.5 if plural is None else plural
    return r.choice(NOUNS) + "s" * plural


def verbs(start: str, forms: tuple[str, str], plural: bool, end: str) -> tuple[str, str]:
    return f"{start} {forms[plural]} {end}.", f"{start} {forms[not plural]} {end}."


PHENOMENA = [agreement, distant_agreement, determiner, bare_verb, participle]


def pairs(generator: random.Random) -> Iterator[dict]:
    """`EACH` different pairs of every phenomenon, taken in turns."""
    seen: set[str] = set()
    for _ in range(EACH):
        for make in PHENOMENA:
            good, bad = make(generator)
            while good in seen:
                good, bad = make(generator)
            seen.add(good)
            yield {"phenomenon": make.__name__, "good": good, "bad": bad}
