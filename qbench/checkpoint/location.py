"""Finds a model: in a folder, in a GGUF file, or on the Hugging Face hub.

qbench uses the network only for hub ids. Models are downloaded into the hub's own cache. Offline, or with
HF_HUB_OFFLINE=1, only the cache is used.
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
_TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]  # config, index, tokenizer, generation
_CODE_FILES = ["*.py"]
_IGNORED_FILES = ["*/*", "consolidated*"]  # a second copy of the weights, in the layout of another library


def locate(path: str | None, revision: str | None = None, code: bool = False) -> Path:
    """The folder of a model, or its GGUF file.

    path: a folder, a file, or a hub id; None for the bundled model. A hub id is downloaded into the hub's cache. revision:
    of a hub id, a branch, tag or commit; main by default. code: download the Python files as well. Raises InputError.
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
    return _download_snapshot(path, revision or MAIN, code)


def is_hub_id(path: str) -> bool:
    """Whether a path is owner/name on the hub, and not a local path: there is no folder `owner` here."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).parent.is_dir()


def find_commit(path: str | None, revision: str | None = None) -> str | None:
    """The commit of a hub id's revision; None for a folder or a file."""
    return locate(path, revision).name if path and is_hub_id(path) else None


def download_config(path: str, revision: str | None = None) -> Path:
    """Download the config.json of a hub id, without the weights. Raises InputError."""
    try:
        return Path(hf_hub_download(path, CONFIG, revision=revision))
    except Exception as error:
        raise InputError(_describe_failure(path, revision or MAIN, error)) from error


@lru_cache  # one command uses one commit of a branch, even if the branch moves meanwhile
def _download_snapshot(path: str, revision: str, code: bool) -> Path:
    try:
        for weights in (["*.safetensors"], ["*.bin"]):
            wanted = [*_TEXT_FILES, *weights, *(_CODE_FILES if code else [])]
            folder = _download(path, revision=revision, allow_patterns=wanted, ignore_patterns=_IGNORED_FILES)
            if any(folder.glob(weights[0])):
                break
    except Exception as error:
        raise InputError(_describe_failure(path, revision, error)) from error
    if not (folder / CONFIG).is_file():
        raise InputError(f"model.path: {path!r} at {revision} holds no {CONFIG}; accepted: a causal LM")
    return folder


def _download(path: str, **options: Any) -> Path:
    """The snapshot from the hub, or from the cache if the hub cannot be reached."""
    try:
        return Path(snapshot_download(path, **options))
    except Exception:  # of many types: hub, HTTP, sockets. It is raised again unless the cache is complete
        with suppress(Exception):
            return Path(snapshot_download(path, **options, local_files_only=True))
        raise


def _describe_failure(path: str, revision: str, error: Exception) -> str:
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"model.path: {path!r} at {revision} cannot be loaded from the hub or its cache: {why}"
