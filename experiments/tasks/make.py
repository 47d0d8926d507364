"""Write the documents of the bundled tasks, the same bytes every time: `python experiments/tasks/make.py`.

Two tasks are cut from the held-out pieces of the bundled text `docs`. Neither the bundled model nor any run is trained
on them. The third task is made from templates.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from grammar import pairs

from qbench.training import data

SEED = 0
TASKS = Path(__file__).parents[2] / "qbench" / "assets" / "tasks"
LENGTH = 800  #: minimum number of characters of a document
CONTEXT, CONTINUATION = 12, 8  #: words
ITEMS = 100
NEAREST = 8  #: the three wrong choices come from this many continuations of similar length


def main(folder: Path = TASKS) -> None:
    generator = random.Random(SEED)
    held_out = data.read("docs").held_out
    write(folder / "qbench_docs.jsonl", documents(held_out))
    write(folder / "qbench_continuation.jsonl", continuations(held_out, generator))
    write(folder / "qbench_grammar.jsonl", pairs(generator))


def write(file: Path, rows: Iterator[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def documents(pieces: list[str]) -> Iterator[dict]:
    """Documents of about `LENGTH` characters, cut between paragraphs."""
    for piece in pieces:
        current: list[str] = []
        for paragraph in filter(None, map(str.strip, piece.split("\n\n"))):
            current.append(paragraph)
            if sum(map(len, current)) >= LENGTH:
                yield {"text": "\n\n".join(current)}
                current = []
        if current:
            yield {"text": "\n\n".join(current)}


def continuations(pieces: list[str], generator: random.Random) -> Iterator[dict]:
    """Items of a context, its continuation, and three other continuations of similar length, in random order."""
    sentences = []
    for piece in pieces:
        for paragraph in piece.split("\n"):
            words = paragraph.split()
            step = CONTEXT + CONTINUATION
            for at in range(0, len(words) - step + 1, step):
                context, true = words[at : at + CONTEXT], words[at + CONTEXT : at + step]
                sentences.append((" ".join(context), " ".join(true)))
    for context, true in sorted(generator.sample(sentences, ITEMS)):
        others = sorted({c for _, c in sentences} - {true}, key=lambda c: (abs(len(c) - len(true)), c))
        choices = [true, *generator.sample(others[:NEAREST], 3)]
        generator.shuffle(choices)
        yield {"context": context, "choices": choices, "answer": choices.index(true)}


if __name__ == "__main__":
    main()
