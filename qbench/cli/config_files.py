"""The folders of the configuration files, and the meaning of each key from their comments."""

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
EXPERIMENTS = PACKAGE / "experiments" if (PACKAGE / "experiments").is_dir() else PACKAGE.parent / "experiments"
_KEY = re.compile(r"(?P<indent> *)(?P<name>[a-z_]+):(?: +(?P<default>[^#\s][^#]*?))?(?: +# *(?P<meaning>.*))?")
_NOT_OURS = ("defaults", "hydra")


def read_keys(file: Path, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Returns the default and the meaning of each key of a file in conf/, by dotted name. Its comment is the meaning."""
    explained: dict[str, tuple[str, str]] = {}
    section = ""
    for line in file.read_text("utf-8").splitlines():
        key = _KEY.fullmatch(line)
        if not key:
            continue
        if not key["indent"]:
            section = key["name"]
        if section in _NOT_OURS:
            continue
        name = f"{section}.{key['name']}" if key["indent"] else key["name"]
        if key["default"] is not None:
            explained[f"{prefix}{name}"] = key["default"], key["meaning"] or ""
    return explained
