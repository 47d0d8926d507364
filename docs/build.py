"""Build the site of pages and API reference: `python docs/build.py FOLDER`. FOLDER/index.html needs no network.

MkDocs takes pages from one folder, but ours link to files all over the repository. So pages and linked files are first
copied into one folder, in the layout of the repository. The links then work on the site as in a checkout.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from mkdocs.commands.build import build
from mkdocs.config import load_config

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = ROOT / "build" / "pages"
SHOWN = {".py", ".yaml", ".sh", ".lock", ".cff", ""}  #: suffixes of files that become a page of code
LINK = re.compile(r'(\]\()([^)#\s]+)((?:#[^)\s]*)?(?: "[^"]*")?\))')


def gather(pages: Path) -> None:
    """Copy README.md, CONTRIBUTING.md, CHANGELOG.md, docs/*.md and all they link to into `pages`.

    Raises FileNotFoundError for a broken link.
    """
    waiting = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()

        def place(link: re.Match, page: Path = page) -> str:
            """Returns the link for the site. Copies its target, or queues it if it is a page."""
            before, target, after = link.groups()
            if re.match(r"[a-z]+:", target):
                return link[0]
            file = (page.parent / target).resolve()
            if file.is_dir():
                file, target = file / "README.md", f"{target.rstrip('/')}/README.md"
            if not file.exists():
                raise FileNotFoundError(f"{page.relative_to(ROOT)} links to {target}, which does not exist")
            if file.suffix in SHOWN:
                copy = pages / f"{file.relative_to(ROOT)}.md"
                copy.parent.mkdir(parents=True, exist_ok=True)
                language = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".cff": "yaml"}.get(file.suffix, "text")
                copy.write_text(
                    f"# {file.relative_to(ROOT)}\n\n````{language}\n{file.read_text('utf-8')}````\n", "utf-8"
                )
                return f"{before}{target}.md{after}"
            if file.suffix != ".md":
                copy_file(file, pages)
            elif file not in seen:
                seen.add(file)
                waiting.append(file)
            return link[0]

        parts = re.split(r"(^```.*?^```$)", page.read_text("utf-8"), flags=re.M | re.S)  # no links within code
        parts[::2] = [LINK.sub(place, part) for part in parts[::2]]
        copy = pages / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("".join(parts), "utf-8")
    copy_file(DOCS / "site.css", pages)


def copy_file(file: Path, pages: Path) -> None:
    copy = pages / file.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, copy)


def main(site: Path) -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    gather(PAGES)
    subprocess.run([sys.executable, DOCS / "api" / "build.py", PAGES / "api"], check=True)
    build(load_config(str(DOCS / "mkdocs.yml"), docs_dir=str(PAGES), site_dir=str(site.resolve())))
    print(f"the site: {site / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
