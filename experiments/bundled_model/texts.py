"""Write the two texts that ship with qbench: the King James Bible and held-out public-domain documentation.

    python experiments/bundled_model/texts.py

`docs.txt` is written only if the corpus exists (corpus.py).
"""

import argparse
import json
import lzma
import re
import subprocess
from pathlib import Path

from corpus import digest
from packages import unpack

PUBLIC_DOMAIN = ("sqlite3-doc", "dict-jargon")
ASSETS = Path(__file__).resolve().parents[2] / "qbench" / "assets" / "text"


def king_james(work: Path) -> str:
    """Returns all 66 books, one verse per line under chapter headings.

    The package has its own compressed format, so its own reader prints the text.
    """
    reader = unpack("bible-kjv", work)[0] / "usr/bin/bible"
    data = unpack("bible-kjv-text", work)[0] / "usr/lib"
    command = [reader, "-p", data, "-l4000", "gen1:1-rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout

    lines, book, chapter = [], None, None
    for line in printed.splitlines():
        if heading := re.fullmatch(r"(\S.*?) (\d+)", line):
            if heading[1] != book:
                lines += ["", heading[1]]
            book, chapter = heading.groups()
            lines += ["", f"{book} {chapter}", ""]
        elif verse := re.fullmatch(r" +(\d+) (.+)", line):
            lines.append(f"{chapter}:{verse[1]} {verse[2].strip()}")
        elif line.strip():
            raise ValueError(f"neither a heading nor a verse: {line!r}")
    return "\n".join(lines).strip() + "\n"


def held_out_documentation(work: Path) -> str:
    """Returns the held-out documents of the public-domain sources, in mixed order."""
    with open(work / "heldout.jsonl", encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    texts = [d["text"] for d in documents if d["source"] in PUBLIC_DOMAIN]
    # In the order of a hash, so that the first thousand tokens come from every source.
    return "\n\n".join(sorted(texts, key=digest)) + "\n"


def write(name: str, text: str) -> None:
    path = ASSETS / f"{name}.xz"
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{name}: {len(text):,} characters, {path.stat().st_size:,} bytes compressed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bundled_model"))
    work = parser.parse_args().work.resolve()
    write("kjv.txt", king_james(work))
    if (work / "heldout.jsonl").exists():
        write("docs.txt", held_out_documentation(work))


if __name__ == "__main__":
    main()
