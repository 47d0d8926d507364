"""Build the training corpus of the bundled model: English documentation from Debian packages, as plain text.

    python experiments/bundled_model/corpus.py --work build/bundled_model

Writes to the work folder `train.jsonl` and `heldout.jsonl` (one document per line: source, name, text) and `sources.json`
(package, version, licence, characters). Which documents are held out depends only on their own text.
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from packages import declared_licences, unpack
from readers import LONGEST_LISTING, Block, dictd, markup, pod

MB = 1_000_000


@dataclass(frozen=True)
class Source:
    package: str
    licence: str  # of the documentation itself, as debian/copyright names it
    glob: str
    reader: Callable[[list[Path]], Iterator[tuple[str, list[Block]]]] = markup
    cap: float = 4 * MB
    heldout: float = 0.015
    avoid: str = r"$^"


INDEXES = (
    r"(genindex|py-modindex|search|index|contents|ix\d+|bk\d+-toc|.*crossref|keyword_index|sitemap|changelog)\.html"
)

# More is held out of public-domain sources, because only their text can be shipped for evaluation.
SOURCES = [
    Source("sqlite3-doc", "public domain", "usr/share/doc/sqlite3/**/*.html", cap=6 * MB, heldout=0.09),
    Source("dict-jargon", "public domain", "usr/share/dictd/*.dict.dz", dictd, heldout=0.12),
    Source("abs-guide", "public domain", "usr/share/doc/abs-guide/html/*.html"),
    Source("anarchism", "GPL-2", "usr/share/doc/anarchism/html/*.html", cap=6 * MB, heldout=0.06),
    Source("postgresql-doc-15", "PostgreSQL", "usr/share/doc/postgresql-doc-15/html/*.html", cap=6 * MB,
           avoid=r"(release-|.*-index|bookindex|features|biblio|errcodes)"),
    Source("python3.11-doc", "PSF-2", "usr/share/doc/python3.11/html/**/*.html", cap=5 * MB, avoid=r"changelog"),
    Source("python-django-doc", "BSD-3-Clause", "usr/share/doc/python-django-doc/html/**/*.html", cap=5 * MB),
    Source("apache2-doc", "Apache-2.0", "usr/share/doc/apache2-doc/manual/en/**/*.html"),
    Source("git-doc", "GPL-2", "usr/share/doc/git-doc/**/*.html", avoid=r"(RelNotes|git\.html)"),
    Source("perl-doc", "GPL-1+ or Artistic", "usr/share/perl/*/pod/*.pod", pod, cap=5 * MB,
           avoid=r"perl(5\d+delta|toc|uniprops|ebcdic|api|intern)"),
    Source("debian-handbook", "CC-BY-SA-3.0 or GPL-2+", "usr/share/doc/debian-handbook/html/en-US/*.html"),
    Source("debian-reference-en", "GPL-2+", "usr/share/debian-reference/*.en.html"),
    Source("debian-policy", "GPL-2+", "usr/share/doc/debian-policy/policy.html/*.html"),
    Source("developers-reference", "GPL-2+", "usr/share/developers-reference/*.html"),
    Source("debian-history", "GPL-2+", "usr/share/doc/debian-history/docs/*.en.html"),
    Source("debian-faq", "verbatim-copying notice (copyleft)", "usr/share/doc/debian/FAQ/*.en.html"),
    Source("aptitude-doc-en", "GPL-2+", "usr/share/doc/aptitude/html/en/*.html"),
    Source("gnome-user-docs", "CC-BY-SA-3.0", "usr/share/help/C/**/*.page"),
    Source("freedombox-doc-en", "CC-BY-SA-4.0", "usr/share/freedombox/manual/en/*.html"),
    Source("libreoffice-help-en-us", "MPL-2.0", "usr/share/libreoffice/help/en-US/text/**/*.html", cap=3 * MB),
    Source("lilypond-doc-html", "GFDL-1.3+", "usr/share/doc/lilypond/html/Documentation/**/*.html", cap=3 * MB,
           avoid=r".*\.(ca|cs|de|es|fr|hu|it|ja|nl|pt|zh)\.html|.*-big-page|.*internals"),
    Source("kicad-doc-en", "GPL-3+ or CC-BY-3.0+", "usr/share/doc/kicad/help/en/*.html"),
    Source("png-definitive-guide", "GFDL-1.1+", "usr/share/doc/png-definitive-guide/html/*.html"),
    Source("dict-foldoc", "GFDL-1.1+", "usr/share/dictd/*.dict.dz", dictd),
    Source("dict-gcide", "GPL-2+", "usr/share/dictd/*.dict.dz", dictd, cap=4 * MB),
    Source("dict-wn", "WordNet-3.0", "usr/share/dictd/*.dict.dz", dictd, cap=2.5 * MB),
]  # fmt: skip

OVERLAP = 13  # words; a run this long is a quotation, not a phrase
COMMON = frozenset(
    re.findall(r"\w+", "the of and to in a is that for it as with be are by this on or an if not can from you at")
)


def readable(text: str) -> bool:
    """Whether a document looks English: enough words, enough common words, few symbols, few foreign letters."""
    words = re.findall(r"[A-Za-z']+", text)
    if len(words) < 60:
        return False
    letters = sum(map(len, words)) + text.count(" ")
    foreign = sum(ord(c) > 126 for c in text)
    common = sum(w.lower() in COMMON for w in words)
    return common > 0.17 * len(words) and letters > 0.78 * len(text) and foreign < 0.015 * len(text)


def kept(block: Block) -> bool:
    kind, text, linked = block
    if kind == "pre":
        return text.count("\n") < LONGEST_LISTING and len(text) < 800
    if linked > 0.6 * len(text):
        return False
    return kind == "h" or len(text) > 2


def join(blocks: list[Block]) -> str:
    """Join blocks with empty lines, except between list items. Headings without text under them are dropped."""
    out, previous = [], ""
    for (kind, text, _), following in pairwise([*blocks, ("end", "", 0)]):
        if kind == "h" and following[0] in ("h", "end"):
            continue
        if out:
            out.append("\n" if kind == previous == "li" else "\n\n")
        out.append(f"- {text}" if kind == "li" else text)
        previous = kind
    return "".join(out)


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def documents(source: Source, root: Path, seen: set[int]) -> list[tuple[str, str]]:
    """Returns the clean documents of one package. seen: digests of the paragraphs so far, which are not taken again."""
    avoid = re.compile(source.avoid)
    paths = sorted(p for p in root.glob(source.glob) if not re.fullmatch(INDEXES, p.name) and not avoid.match(p.name))
    if not paths:
        raise FileNotFoundError(f"{source.package}: nothing matches {source.glob}")
    pages = []
    for name, blocks in source.reader(paths):
        linked, total = sum(b[2] for b in blocks), sum(len(b[1]) for b in blocks)
        if total and linked < 0.5 * total:
            pages.append((name, [b for b in blocks if kept(b)]))

    # Blocks that many pages repeat are page furniture: captions of buttons, copyright lines.
    repeats = Counter(text for _, blocks in pages for text in {b[1] for b in blocks if b[0] != "h"})
    furniture = {text for text, n in repeats.items() if n > max(5, 0.05 * len(pages))}
    result = []
    for name, blocks in pages:
        fresh = []
        for block in blocks:
            mark = digest(block[1])
            if block[1] in furniture or (len(block[1]) > 60 and mark in seen):
                continue
            if len(block[1]) > 60:
                seen.add(mark)
            fresh.append(block)
        text = join(fresh)
        if readable(text):
            result.append((name, text))
    return result


def runs_of_words(text: str) -> Iterator[str]:
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + OVERLAP]) for i in range(len(words) - OVERLAP + 1))


def decontaminated(heldout: list[dict], train: Path) -> list[dict]:
    """Returns the held-out documents without the paragraphs that share a long run of words with the train split.

    Manuals quote each other (FOLDOC has much of the Jargon File, reworded), which a hash of the document does not show.
    """
    held = {run for document in heldout for run in runs_of_words(document["text"])}
    with open(train, encoding="utf-8") as lines:
        seen = {run for line in lines for run in runs_of_words(json.loads(line)["text"]) if run in held}
    result = []
    for document in heldout:
        paragraphs = document["text"].split("\n\n")
        clean = [p for p in paragraphs if not any(run in seen for run in runs_of_words(p))]
        text = "\n\n".join(clean)
        if len(text) > 0.5 * len(document["text"]) and readable(text):
            result.append(document | dict(text=text))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bundled_model"))
    work = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)

    seen: set[int] = set()
    table: dict[str, dict] = {}
    heldout: list[dict] = []
    with open(work / "train.jsonl", "w", encoding="utf-8") as train:
        for source in SOURCES:
            root, version = unpack(source.package, work)
            ordered = sorted(documents(source, root, seen), key=lambda d: digest(d[1]))
            row = dict(package=source.package, version=version, licence=source.licence,
                       declared=declared_licences(root, source.package),
                       train_documents=0, train_characters=0, heldout_documents=0, heldout_characters=0)  # fmt: skip
            taken = 0
            for name, text in ordered:
                if taken + len(text) > source.cap:
                    continue
                taken += len(text)
                document = dict(source=source.package, name=name, text=text)
                # Another hash than the one that orders the documents, because the cap cuts that order.
                if digest("held out? " + text) < source.heldout * 2**64:
                    heldout.append(document)
                else:
                    train.write(json.dumps(document) + "\n")
                    row["train_documents"] += 1
                    row["train_characters"] += len(text)
            table[source.package] = row
            print(f"{source.package:24} {row['train_documents']:5} documents, {row['train_characters'] / MB:5.2f} MB")

    with open(work / "heldout.jsonl", "w", encoding="utf-8") as out:
        for document in decontaminated(heldout, work / "train.jsonl"):
            out.write(json.dumps(document) + "\n")
            table[document["source"]]["heldout_documents"] += 1
            table[document["source"]]["heldout_characters"] += len(document["text"])
    (work / "sources.json").write_text(json.dumps(list(table.values()), indent=1) + "\n")
    for side in ("train", "heldout"):
        print(f"{side}: {sum(r[f'{side}_characters'] for r in table.values()) / MB:.2f} MB")


if __name__ == "__main__":
    main()
