"""Debian packages as a source of text: download and unpack them, and read their licences."""

import re
import subprocess
from pathlib import Path


def unpack(package: str, work: Path) -> tuple[Path, str]:
    """Download and unpack a Debian package, if that was not done before. Returns its folder and version."""
    debs = work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    if not list(debs.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=debs, check=True, capture_output=True)
    deb = sorted(debs.glob(f"{package}_*.deb"))[-1]
    version = subprocess.run(["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True).stdout
    root = work / "unpacked" / package
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = root.with_name(root.name + ".partial")
        subprocess.run(["dpkg-deb", "-x", deb, partial], check=True)
        partial.rename(root)
    return root, version.strip()


def declared_licences(root: Path, package: str) -> list[str]:
    """Returns the `License:` names in a machine-readable debian/copyright, for a person to compare with the table."""
    copyright_file = root / "usr/share/doc" / package / "copyright"
    if not copyright_file.exists():
        return []
    names = re.findall(r"^License: *(.+)$", copyright_file.read_text(errors="replace"), re.M)
    return sorted(set(names))
