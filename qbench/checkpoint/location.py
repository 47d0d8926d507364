"""Where a model is: a folder, a GGUF file, or a hub id, which is a folder once it has been downloaded.

A hub id is the one thing for which qbench uses the network, and what it names is kept in the hub's own cache. Offline, or
with HF_HUB_OFFLINE=1, the cache alone is asked.
"""

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

from qbench.errors import InputError

from .recipe import CONFIG

BUNDLED = Path(__file__).parents[1] / "assets" / "model"
MAIN = "main"
_BESIDE = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]  # config, index, tokenizer, generation
_CODE = ["*.py"]
_NOT = ["*/*", "consolidated*"]  # a second copy of the weights, in the layout of another library


def locate(path: str | None, revision: str | None = None, code: bool = False) -> Path:
    """The folder of a model, or its GGUF file; None is the bundled model.

    Of a hub id that is the snapshot of `revision` (a branch, a tag or a commit, by default main) in the hub's cache; code:
    have the Python files with it. Raises InputError.
    """
    folder = BUNDLED if path is None else Path(path).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise InputError(f"model.path: {path!r} holds no {CONFIG}; accepted: a folder that save_pretrained wrote")
        return folder
    if path is None or not is_hub_id(path):
        raise InputError(
            f"model.path: {path!r} does not exist; accepted: a folder with a model, or a hub id owner/name"
        )
    return _snapshot(path, revision or MAIN, code)


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist reads as owner/name on the hub."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).expanduser().parent.is_dir()


def commit(path: str | None, revision: str | None = None) -> str | None:
    """The commit of a hub id's revision; None of a folder or a file."""
    return locate(path, revision).name if path and not Path(path).expanduser().exists() else None


def hub_config(path: str, revision: str | None = None) -> Path:
    """The config.json of a hub id, without its weights. Raises InputError."""
    try:
        return Path(hf_hub_download(path, CONFIG, revision=revision))
    except Exception as error:
        raise InputError(_not_there(path, revision or MAIN, error)) from error


@lru_cache  # what a branch is when a command begins, it is to its end
def _snapshot(path: str, revision: str, code: bool) -> Path:
    try:
        for weights in (["*.safetensors"], ["*.bin"]):
            wanted = [*_BESIDE, *weights, *(_CODE if code else [])]
            folder = _downloaded(path, revision=revision, allow_patterns=wanted, ignore_patterns=_NOT)
            if any(folder.glob(weights[0])):
                break
    except Exception as error:
        raise InputError(_not_there(path, revision, error)) from error
    if not (folder / CONFIG).is_file():
        raise InputError(f"model.path: {path!r} at {revision} holds no {CONFIG}; accepted: a causal LM")
    return folder


def _downloaded(path: str, **which: Any) -> Path:
    """The snapshot, from the hub, or where that cannot be reached, from the cache alone."""
    try:
        return Path(snapshot_download(path, **which))
    except Exception:  # of the hub's, of HTTP's, of sockets': the first is told, unless the cache has it all
        with suppress(Exception):
            return Path(snapshot_download(path, **which, local_files_only=True))
        raise


def _not_there(path: str, revision: str, error: Exception) -> str:
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"model.path: {path!r} at {revision} cannot be had from the hub or its cache: {why}"
