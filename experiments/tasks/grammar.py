"""Minimal pairs: two sentences that differ in one word, one of them grammatical."""

import random
from collections.abc import Iterator

EACH = 40  #: pairs per phenomenon

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
#: base form, third person, past tense, past participle
VERBS = [
    ("write", "writes", "wrote", "written"), ("take", "takes", "took", "taken"), ("give", "gives", "gave", "given"),
    ("choose", "chooses", "chose", "chosen"), ("see", "sees", "saw", "seen"), ("break", "breaks", "broke", "broken"),
    ("know", "knows", "knew", "known"), ("draw", "draws", "drew", "drawn"),
]  # fmt: skip
MODALS = ["can", "must", "should", "will", "may", "does not", "cannot"]


def agreement(r: random.Random) -> tuple[str, str]:
    """Make a pair in which a verb agrees with its subject, or not."""
    plural = r.random() < 0.5
    start = f"The {noun(r, plural)}"
    return verbs(start, r.choice([("is", "are"), ("was", "were"), ("has been", "have been")]), plural, r.choice(STATES))


def distant_agreement(r: random.Random) -> tuple[str, str]:
    """Make a pair in which a verb agrees with its subject, or with the nearer noun, which has the other number."""
    plural = r.random() < 0.5
    start = f"The {noun(r, plural)} {r.choice(PREPOSITIONS)} the {noun(r, not plural)}"
    return verbs(start, r.choice([("is", "are"), ("was", "were"), ("has been", "have been")]), plural, r.choice(STATES))


def determiner(r: random.Random) -> tuple[str, str]:
    """Make a pair in which this, that, these or those precede the right number, or the wrong one."""
    plural, word = r.random() < 0.5, r.choice(NOUNS)
    start = r.choice(["See", "You can use", "The program reads", "The next section describes", "Do not change"])
    start += " " + r.choice([("this", "these"), ("that", "those")])[plural]
    good, bad = (f"{word}s", word) if plural else (word, f"{word}s")
    end = r.choice(["first", "for each request", "in the current directory", "before the next release"])
    return f"{start} {good} {end}.", f"{start} {bad} {end}."


def bare_verb(r: random.Random) -> tuple[str, str]:
    """Make a pair in which a modal verb precedes a bare verb, or one with an s."""
    base, third, *_ = r.choice(VERBS)
    start, end = f"The {noun(r, plural=False)} {r.choice(MODALS)}", f"the {noun(r)}."
    return f"{start} {base} {end}", f"{start} {third} {end}"


def participle(r: random.Random) -> tuple[str, str]:
    """Make a pair in which "has been" or "was" precedes a participle, or a past tense."""
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
    """Make `EACH` different pairs of every phenomenon, in turns."""
    seen: set[str] = set()
    for _ in range(EACH):
        for make in PHENOMENA:
            good, bad = make(generator)
            while good in seen:
                good, bad = make(generator)
            seen.add(good)
            yield {"phenomenon": make.__name__, "good": good, "bad": bad}
