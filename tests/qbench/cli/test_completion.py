"""Tab completion, asked for as a shell asks: the line in the environment, the answer in a file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qbench.cli import completion
from qbench.cli.commands import RUN
from qbench.cli.main import COMMANDS

ROOT = Path(__file__).parents[3]
START = "import sys; from qbench.cli.main import main; sys.exit(main())"
SHELL = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\013", "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:"}
WATCHED = START.replace(
    "sys.exit", "import atexit, os; os._exit = sys.exit; atexit.register(lambda: print(*sys.modules)); sys.exit"
)


def completed(line: str, folder: Path, start: str = START) -> tuple[list[str], str]:
    """The words that may follow, and standard output."""
    answer = folder / ".answer"
    environment = {**os.environ, **SHELL, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    environment |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return [word.strip() for word in answer.read_text().split("\013")], done.stdout


CASES = {
    "qbench rep": ["report"],
    "qbench ru": ["run", "runs"],
    "qbench +": ["+format=", "+experiments="],
    "qbench tune.st": ["tune.steps="],
    "qbench +format=nf": ["nf4"],
    "qbench quantize +format=nf": ["nf4"],
    "qbench -m +format=nf4,in": ["nf4,int4", "nf4,int4_asym", "nf4,int8"],
    "qbench +format=nf4 +experiments=q": ["quick"],
    "qbench +format=nf4 tune.optimizer=paged": ["paged_adamw", "paged_adamw_8bit"],
    "qbench +format=nf4 tune=d": ["dora"],
    "qbench run dq=": ["true", "false"],
    "qbench +format=nf4 --mul": ["--multirun"],
    "qbench block=": [""],
    "qbench plan att": ["attention="],
    "qbench plan attention=f": ["flash"],
    "qbench quantize layout=": ["qbench", "bitsandbytes"],
    "qbench quantize model.path=he": ["here/"],
    "qbench data.path=here/": ["here/text.jsonl"],
    "qbench report he": ["here/"],
    "qbench report here --o": ["--out"],
    "qbench runs --cl": ["--clean"],
    "qbench bench pr": ["products"],
    "qbench bench products --models 7": ["7B", "70B"],
    "qbench bench products --formats q4": ["q4_0", "q4_1"],
}


@pytest.mark.parametrize("line", CASES)
def test_the_tab_key_completes(line, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "text.jsonl").touch()
    assert completed(line, tmp_path)[0] == CASES[line]


def test_the_first_word_is_a_command_or_a_key(tmp_path):
    words = completed("qbench ", tmp_path)[0]
    assert {*COMMANDS, "+format=", "block=", "--formats"} <= set(words)
    assert not set(COMMANDS) & set(completed("qbench block=64 ", tmp_path)[0])


@pytest.mark.parametrize("line", ["qbench +format=", "qbench bench products --formats ", "qbench plan "])
def test_nothing_that_takes_time_is_imported(line, tmp_path):
    modules = completed(line, tmp_path, WATCHED)[1].split()
    assert "qbench.keys" in modules
    assert not {"torch", "numpy", "hydra", "omegaconf", "formats", "rich", "transformers"} & set(modules)


def test_the_flags_are_those_of_hydra_and_ours(capsys):
    from hydra._internal.utils import get_args_parser

    known = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    assert set(completion.FLAGS) | set(completion.SWEEP_FLAGS) <= known | {"--formats"}
    assert set(completion.TABLES["run"]) == set(RUN.keys)
