"""What the libraries of tracking themselves read of a run afterwards, each by its own reader."""

import json
import os
import sys
from pathlib import Path

import pytest

from qbench.cli.run import main
from qbench.errors import InputError
from qbench.runs import trackers
from tests.qbench.cli.test_run import SHORT


def run(folder: Path, model: Path, tracker: str, monkeypatch) -> dict:
    monkeypatch.chdir(folder)
    arguments = ["+format=nf4", f"model.path={model}", f"track={tracker}", "hydra.run.dir=out", *SHORT]
    monkeypatch.setattr(sys, "argv", ["qbench", *arguments])
    assert main() == 0
    assert not [name for name in os.environ if name.startswith(("WANDB", "MLFLOW"))]
    assert [file.name for file in folder.iterdir()] == ["out"], "nothing is written elsewhere"
    return json.loads((folder / "out" / "result.json").read_text())


def test_tensorboard(tiny_llama, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = run(tmp_path, tiny_llama, "tensorboard", monkeypatch)["metrics"]
    events = EventAccumulator(str(tmp_path / "out" / "qbench"))
    events.Reload()
    losses = events.Scalars("tune/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert [event.value for event in losses] == pytest.approx(metrics["tune"]["loss"])
    assert events.Scalars("quality/tuned/nll")[0].value == pytest.approx(metrics["quality"]["tuned"]["nll"])


def test_a_metric_with_a_filter_has_a_name_that_all_accept(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with trackers.open_trackers(("tensorboard",), tmp_path, {"seed": 0}) as tracks:
        tracks.result({"tasks": {"tuned": {"cases": {"exact_match,first": {"value": 0.5, "documents": [0, 1]}}}}}, 3)
    events = EventAccumulator(str(tmp_path / "qbench"))
    events.Reload()
    assert events.Tags()["scalars"] == ["tasks/tuned/cases/exact_match-first/value"]


def test_mlflow(tiny_llama, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    metrics = run(tmp_path, tiny_llama, "mlflow", monkeypatch)["metrics"]
    (tracked,) = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}").search_runs(["1"])
    assert tracked.data.params["format.name"] == "nf4" and tracked.info.status == "FINISHED"
    assert tracked.data.metrics["quality/tuned/nll"] == pytest.approx(metrics["quality"]["tuned"]["nll"])
    assert tracked.data.metrics["tune/loss"] == pytest.approx(metrics["tune"]["loss"][-1])


def test_wandb(tiny_llama, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    run(tmp_path, tiny_llama, "wandb", monkeypatch)
    (kept,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    assert kept.stat().st_size > 1000


@pytest.mark.parametrize(("given", "names"), [(None, ()), ("tensorboard", ("tensorboard",)), ([], ())])
def test_names(given, names):
    assert trackers.checked(given) == names


@pytest.mark.parametrize("given", ["comet", ["tensorboard", "x"], 3])
def test_bad_names(given):
    with pytest.raises(InputError, match=r"track: .* accepted: tensorboard, mlflow, wandb"):
        trackers.checked(given)


def test_one_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'wandb>="):
        trackers.checked("wandb")
