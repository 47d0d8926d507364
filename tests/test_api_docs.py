"""The API is built from docstrings and the site from pages; every link leads somewhere, none needs a network."""

import re
import subprocess
import sys
from os.path import normpath
from pathlib import Path

import pytest

import qbench

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[Path, str]:
    folder = tmp_path_factory.mktemp("api")
    command = [sys.executable, "docs/api/build.py", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return {file.relative_to(folder): file.read_text() for file in folder.rglob("*.html")}


@pytest.mark.thorough
def test_every_module_has_a_page(pages):
    files = [file.relative_to(ROOT) for name in ("qbench", "formats") for file in (ROOT / name).rglob("*.py")]
    inside = [file for file in files if (ROOT / file.parent / "__init__.py").exists() and file.stem != "__main__"]
    modules = {file.parent if file.stem == "__init__" else file.with_suffix("") for file in inside}
    assert set(pages) == {Path(f"{module}.html") for module in modules} | {Path("index.html")}
    for name in qbench.__all__:
        assert f'id="{name}"' in pages[Path("qbench.html")]


@pytest.mark.thorough
def test_what_comments_say_of_variables_is_told(pages):
    assert "whether each block has a shift z" in pages[Path("formats.html")]  # in the line
    assert "the linear layers of Llama" in pages[Path("qbench/bench/products.html")]  # in the line before


@pytest.mark.thorough
def test_every_link_leads_somewhere(pages):
    for page, text in pages.items():
        for target in set(re.findall(r'href="([^"$#]+)', text)):
            assert re.match(r"https?:|data:", target) or Path(normpath(page.parent / target)) in pages, (page, target)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "docs/build.py", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.thorough
def test_the_site_opens_without_a_network(site):
    pages = [site / "index.html", site / "CONTRIBUTING.html", site / "api" / "index.html", *site.glob("docs/*.html")]
    names = {file.stem for file in (ROOT / "docs").glob("*.md")}
    assert names <= {page.stem for page in pages}
    for page in pages:
        text = page.read_text("utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', text), page
        for target in set(re.findall(r'(?:href|src)="(?!\w+:)([^"#?$]+)', text)):
            assert (page.parent / target).exists(), (page, target)
    for style in site.glob("**/*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", style.read_text("utf-8")), style
