"""A sweep says which run it is at, how long it may take, and ends with a table."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from qbench.cli import command_line
from qbench.cli.commands import RUN
from qbench.cli.sweep import Outcome, Progress, describe_seconds, differing_keys, show_table
from qbench.errors import InputError
from qbench.results import store
from tests.qbench.sample_results import finished


@pytest.mark.parametrize(
    ("line", "jobs"),
    [
        (["-m", "+format=nf4,int4", "block=32,64", "dq=false,true"], 8),
        (["-m", "+format=nf4", "seed=range(0,5)"], 5),
        (["-m", "+format=nf4", "seed=1,2", "seed=3"], 1),
        (["-m", "+format=nf4", "hydra/sweeper=basic"], None),
    ],
)
def test_the_runs_of_a_sweep_are_counted(line, jobs):
    assert command_line.read(RUN, line).jobs == jobs


def test_the_runs_of_a_named_sweep_are_counted():
    named, more = (command_line.read(RUN, ["+experiments=quick", *line]).jobs for line in ([], ["seed=1,2"]))
    assert named > 1 and more == 2 * named


def test_a_run_is_announced_with_the_time_left():
    progress = Progress(total=12)
    assert progress.describe(0, Path("x/nf4")) == "run 1 of 12: nf4"
    progress.seconds += [20.0, 40.0]
    assert progress.describe(2, Path("x/nf4")) == "run 3 of 12, about 5 min left: nf4"
    assert Progress().describe(2, Path("x/nf4")) == "run 3: nf4", "a launcher's process knows no total"
    assert [describe_seconds(s) for s in (4, 600, 36000)] == ["4 s", "10 min", "10.0 h"]


def test_the_table_has_a_row_for_each_run_and_cuts_nothing(tmp_path):
    failed = store.new_result({"format": {"name": "nf4"}, "block": 0, "dq": True})
    failed["error"] = store.describe_error(InputError("no"))
    runs = {
        "one": finished("nf4", 1, tuned=(2.0, 2.1)),
        "two": finished("a_format_with_quite_a_long_name_that_needs_room_in_the_table", 2, tuned=(2.0, 2.1)),
        "failed": failed,
    }
    for name, result in runs.items():
        store.write(tmp_path / name, result)
    outcomes = [Outcome(tmp_path / name, int(name not in ("one", "two")), "") for name in (*runs, "lost")]
    out = io.StringIO()
    show_table(outcomes, Console(file=out, width=80, highlight=False, markup=False))
    text = out.getvalue()
    assert "…" not in text and "\x1b" not in text and max(map(len, text.splitlines())) <= 80
    lines = [re.split(r" {2,}", line.strip()) for line in text.strip().splitlines()]
    assert lines[0] == ["run", "bits/weight", "perplexity", "tuned perplexity", "status"]
    assert lines[1][1:] == ["4.500", "21.12", "7.77", "done"] and "nf4, block 64, seed=1".startswith(lines[1][0][:10])
    squeezed = re.sub(r"\s", "", "".join(line[: text.index("bits/weight") - 1] for line in text.splitlines()))
    assert "a_format_with_quite_a_long_name_that_needs_room_in_the_table,block64" in squeezed
    assert "InputError" in text and "lost" in text and "not done" in text


def test_keys_that_differ_are_part_of_a_row():
    configs = [{"format": {"name": "nf4"}, "block": 64, "seed": 0, "tune": {"lr": lr}} for lr in (0.1, 0.2)]
    assert differing_keys(configs) == ["tune.lr"]
