"""Read documentation as plain paragraphs, from HTML and XML, POD, and dictd dictionaries."""

import gzip
import html
import re
import textwrap
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

Block = tuple[str, str, int]  # kind ("p", "h", "li", "pre"), text, characters inside links

BLOCK_TAGS = {
    "p", "div", "li", "tr", "dt", "dd", "table", "ul", "ol", "dl", "blockquote", "section", "article", "body",
    "main", "figure", "figcaption", "hr", "center", "caption",
    "item", "note", "terms", "steps", "list",
}  # fmt: skip
HEADING_TAGS = {"h1", "h2", "h3", "h4", "h5", "h6", "title"}
VERBATIM_TAGS = {"pre", "screen", "listing"}
SKIP_TAGS = {
    "script", "style", "head", "nav", "footer", "svg", "form", "select", "button", "aside", "info", "noscript",
    "template", "object", "textarea",
}  # fmt: skip
SKIP_CLASS = re.compile(
    r"(^|[\s_-])(nav\w*|toc|fancy_toc|sidebar\w*|sphinxsidebar\w*|footer|breadcrumbs?|related|menu\w*|headerlink"
    r"|nosearch|mobileonly|desktoponly|searchmenu|seealso|see_also|langbar|toplang|bottomlang|up|menubar"
    r"|apache|print-only|genindex\w*|hidden|mw-editsection|t-navbar\w*|linenos)($|[\s_-])",
    re.I,
)
# Only these are reliably closed. Skipping from an unclosed <li> or <p> would drop the rest of the page.
CLOSING_TAGS = {"div", "ul", "ol", "table", "span", "a", "section", "header", "dl"}

LONGEST_LISTING = 12
QUOTES = str.maketrans(
    {"‘": "'", "’": "'", "´": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "•": "-", "¶": ""}
)


def plain(text: str) -> str:
    """Use one spelling for quotes, dashes and spaces, because the vocabulary is small."""
    text = unicodedata.normalize("NFKC", text.translate(QUOTES))
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c)[0] != "C")


class _Blocks(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._kind, self._text, self._linked = "p", [], 0
        self._skipping: tuple[str, int] | None = None
        self._links = self._verbatim = 0

    def flush(self, kind: str) -> None:
        raw = plain("".join(self._text))
        listing = self._kind == "pre"
        text = textwrap.dedent(raw.expandtabs(4)).strip("\n").rstrip() if listing else " ".join(raw.split())
        if text:
            self.blocks.append((self._kind, text, self._linked))
        self._kind, self._text, self._linked = kind, [], 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self._skipping:
            name, depth = self._skipping
            if tag == name:
                self._skipping = name, depth + 1
            return
        marks = " ".join(v or "" for k, v in attributes if k in ("class", "id", "rel"))
        if tag in SKIP_TAGS or (tag in CLOSING_TAGS and marks and SKIP_CLASS.search(marks)):
            self._skipping = tag, 1
        elif tag in VERBATIM_TAGS:
            self.flush("pre")
            self._verbatim += 1
        elif self._verbatim:
            if tag == "br":
                self._text.append("\n")
        elif tag in HEADING_TAGS:
            self.flush("h")
        elif tag == "p" and self._kind == "li" and not "".join(self._text).strip():
            pass
        elif tag in BLOCK_TAGS:
            self.flush("li" if tag in ("li", "item") else "p")
        elif tag in ("td", "th", "br"):
            self._text.append(" ")
        elif tag == "a":
            self._links += 1

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("br", "hr"):
            self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            name, depth = self._skipping
            if tag == name:
                self._skipping = (name, depth - 1) if depth > 1 else None
        elif tag in VERBATIM_TAGS:
            self.flush("p")
            self._verbatim = max(0, self._verbatim - 1)
        elif self._verbatim:
            pass
        elif tag in BLOCK_TAGS or tag in HEADING_TAGS:
            self.flush("p")
        elif tag == "a":
            self._links = max(0, self._links - 1)

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)
            if self._links:
                self._linked += len(data.strip())


def _decoded(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def markup(paths: list[Path]) -> Iterator[tuple[str, list[Block]]]:
    """Read one document per file, from HTML or from XML whose paragraphs are called p (Mallard)."""
    for path in paths:
        parser = _Blocks()
        parser.feed(_decoded(path))
        parser.close()
        parser.flush("p")
        yield path.name, parser.blocks


def _without_pod_codes(text: str) -> str:
    for _ in range(4):  # codes nest, innermost first
        text = re.sub(r"[XZ]<[^<>]*>", "", text)
        text = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
        text = re.sub(r"[BCFIS]<<+ (.*?) >>+", r"\1", text)
        text = re.sub(r"[BCFIS]<([^<>]*)>", r"\1", text)
        text = re.sub(r"E<(\w+)>", lambda m: html.unescape(f"&{m[1]};"), text)
    return text


def pod(paths: list[Path]) -> Iterator[tuple[str, list[Block]]]:
    """Read one document per file of Perl's Plain Old Documentation."""
    for path in paths:
        blocks: list[Block] = []
        for paragraph in re.split(r"\n\s*\n", plain(_decoded(path))):
            paragraph = paragraph.strip("\n")
            if command := re.match(r"=(\w+)\s*(.*)", paragraph, re.S):
                name, text = command[1], " ".join(_without_pod_codes(command[2]).split())
                if name.startswith("head") and text:
                    blocks.append(("h", text, 0))
                elif name == "item" and len(text) > 1:
                    blocks.append(("li", text, 0))
            elif paragraph[:1] in (" ", "\t"):
                blocks.append(("pre", textwrap.dedent(paragraph.expandtabs(4)), 0))
            elif paragraph:
                blocks.append(("p", " ".join(_without_pod_codes(paragraph).split()), 0))
        yield path.name, blocks


_BASE64 = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
_EDITOR_TAGS = re.compile(
    r"\s*\[(?:1913 Webster|Webster[^\]]*|PJC|WordNet[^\]]*|Obs\.|R\.|AS|(?:syn|ant|also):\s[^\]]*)\]"
)
PAGE = 3000


def dictd(paths: list[Path]) -> Iterator[tuple[str, list[Block]]]:
    """Read one document per *page* of consecutive entries, because one entry is too short to be a document."""
    for path in paths:
        data = gzip.decompress(path.read_bytes())
        index = path.with_name(path.name.replace(".dict.dz", ".index")).read_text(errors="replace")

        def number(digits: str) -> int:
            value = 0
            for digit in digits:
                value = value * 64 + _BASE64[digit]
            return value

        spans = set()
        for line in index.splitlines():
            word, start, length = line.split("\t")[:3]
            if not word.startswith("00-database"):
                spans.add((number(start), number(length)))
        name, page, size = "", [], 0
        for start, length in sorted(spans):
            entry = plain(data[start : start + length].decode("utf-8", "replace"))
            entry = _EDITOR_TAGS.sub("", re.sub(r"[{}]", "", entry))
            word, _, body = entry.partition("\n")
            paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", body)]
            if word.count("[") > word.count("]") and paragraphs:
                word = f"{word} {paragraphs.pop(0)}"  # an etymology over two paragraphs
            # Split numbered senses that no blank line separated before the reflow.
            senses = r" (?=(?:n|v|adj|adv) 1: |(?:[2-9]|\d\d): )"
            paragraphs = [q for p in paragraphs for q in re.split(senses, p) if q]
            name = name or word
            page.append(("h", word.strip(), 0))
            page += [("p", p, 0) for p in paragraphs]
            size += length
            if size >= PAGE:
                yield name, page
                name, page, size = "", [], 0
        if page:
            yield name, page
