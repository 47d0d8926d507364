"""Small checkpoints in several files."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import ARCHITECTURES
from tests.qbench.sample_checkpoints import make_sharded, quantize


@pytest.fixture(scope="session")
def sharded_llama(tmp_path_factory) -> Path:
    """A tiny Llama in five files."""
    return make_sharded(ARCHITECTURES["llama"], tmp_path_factory.mktemp("sharded"))


@pytest.fixture
def copied(sharded_llama, tmp_path) -> Path:
    """A copy of the tiny Llama in five files, to be spoiled."""
    return Path(shutil.copytree(sharded_llama, tmp_path / "copied"))


@pytest.fixture(scope="session")
def packed_llama(sharded_llama, tmp_path_factory) -> Path:
    """The tiny Llama packed, in five files."""
    folder = tmp_path_factory.mktemp("packed")
    quantize(sharded_llama, folder, {"name": "quantile", "block": 32, "dq": True})
    return folder


@pytest.fixture
def packed(packed_llama, tmp_path) -> Path:
    """A copy of the packed tiny Llama, to be spoiled."""
    return Path(shutil.copytree(packed_llama, tmp_path / "packed"))
