"""requirements.lock has one release of everything that pyproject.toml names, for every system and Python of the README."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    if line and not line.startswith("#")
]
# sys_platform, platform_system, os_name, platform_machine
SYSTEMS = {
    "Linux x86-64": ("linux", "Linux", "posix", "x86_64"),
    "Linux aarch64": ("linux", "Linux", "posix", "aarch64"),
    "macOS arm64": ("darwin", "Darwin", "posix", "arm64"),
    "Windows x86-64": ("win32", "Windows", "nt", "AMD64"),
}
PYTHONS = ("3.11", "3.12", "3.13")


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": "", **environment})


def asked() -> Iterator[tuple[str, Requirement]]:
    """What pyproject.toml names, and where: "dependencies", or the extra."""
    for part, lines in {"dependencies": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items():
        for line in lines:
            if not line.startswith("qbench-formats["):
                yield part, Requirement(line)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_dependency_has_one_pin_within_its_bounds(system, python):
    keys = "sys_platform", "platform_system", "os_name", "platform_machine"
    environment = dict(zip(keys, SYSTEMS[system], strict=True))
    environment |= {"python_version": python, "python_full_version": f"{python}.1"}
    pins: dict[str, list[str]] = {}
    for pin in PINS:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, f"{pin} is no release"
        if applies(pin, environment):
            pins.setdefault(canonicalize_name(pin.name), []).append(specifier.version)
    assert {name: releases for name, releases in pins.items() if len(releases) > 1} == {}
    for part, wanted in asked():
        if applies(wanted, environment):
            assert canonicalize_name(wanted.name) in pins, f"{wanted} of {part}: run `make lock`"
            (release,) = pins[canonicalize_name(wanted.name)]
            assert wanted.specifier.contains(release, prereleases=True), f"{wanted} of {part}, not {release}"


def test_what_the_dependencies_need_is_pinned_too():
    """As far as it is installed here."""
    pinned = {canonicalize_name(pin.name) for pin in PINS if applies(pin, {})}
    seen: set[tuple[str, str]] = set()
    waiting = [(wanted.name, extra) for _, wanted in asked() if applies(wanted, {}) for extra in ("", *wanted.extras)]
    missing = set()
    while waiting:
        name, extra = name_and_extra = waiting.pop()
        if name_and_extra in seen:
            continue
        seen.add(name_and_extra)
        try:
            needed = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:
            continue
        if canonicalize_name(name) not in pinned:
            missing.add(name)
        waiting += [(r.name, e) for r in needed if applies(r, {"extra": extra}) for e in ("", *r.extras)]
    assert len(seen) > 50 and not missing, "run `make lock`"


def test_the_lock_names_no_address():
    assert not re.search(r"://|@|--|\bhash", (ROOT / "requirements.lock").read_text("utf-8"))


def test_run_and_test_install_by_the_lock():
    text = (ROOT / "Makefile").read_text("utf-8")
    assert "LOCK ?= requirements.lock\n" in text and "LOCKED = $(if $(LOCK),--constraint $(LOCK))\n" in text
    rules = dict(re.findall(r"^(\S+): (?:.*)\n((?:\t.*\n)+)", text, re.M))
    for target, stamp in {"run": ".run", "test": ".test"}.items():
        assert f"\n{target}: $(VENV)/{stamp}\n" in text and "$(LOCKED)" in rules[f"$(VENV)/{stamp}"]
        assert f"\n$(VENV)/{stamp}: pyproject.toml $(LOCK)\n" in text
    assert "$(LOCKED)" not in rules["$(VENV)-lowest/.test"]


def test_the_readme_names_the_systems_and_pythons():
    page = (ROOT / "README.md").read_text("utf-8")
    named = "Python 3.11 to 3.13", "Linux (x86-64 and aarch64)", "macOS (arm64)", "Windows (x86-64)"
    assert [words for words in named if words not in page] == []
