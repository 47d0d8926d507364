"""One run, from the model to its report: `_carry_out` has the steps in their order."""

from collections.abc import Sequence
from pathlib import Path

from qbench.report.run import page
from qbench.results import store
from qbench.settings import Settings
from qbench.system import files, messages

from . import fine_tuning, inputs, quantization, scoring
from .context import RunContext
from .trackers import Tracks, open_trackers


def run(settings: Settings, folder: Path, baselines: Path | None = None, trackers: Sequence[str] = ()) -> dict:
    """Run one experiment. Writes result.json, report.md, its figures and the adapters into `folder`.

    baselines: a folder that the runs of a sweep share, so that they measure each 16-bit model once.
    trackers: names of `trackers.NAMES`; these libraries receive losses and metrics too.

    Returns the result. If `folder` holds the finished result of the same configuration, code, weights and text, that one
    is returned. Raises Busy if another process runs in the folder.

    Any other exception is recorded before it is raised: result.json then has the status, the traceback and what was
    measured until then. A finished result in the folder is kept until the new run has measured something. Outside a sweep,
    a run that is refused or interrupted before that leaves nothing behind.
    """
    result, in_sweep = store.new_result(settings.plain()), baselines is not None
    is_new = not (in_sweep or folder.exists())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with messages.redirect(folder), files.locked(folder), store.record_failure(folder, result, in_sweep):
            files.remove_partial(folder)
            context = RunContext.start(settings, folder, result)
            opened = inputs.open_inputs(context)
            if finished := store.read_finished(folder, result["run"]["id"]):
                return finished
            with open_trackers(trackers, folder, result["config"]) as tracks:
                _carry_out(context, opened, baselines, tracks)
            result["status"] = "done"
            store.write(folder, result)
    except BaseException:
        if is_new:
            store.remove_unbegun(folder)
        raise
    return result


def _carry_out(context: RunContext, opened: inputs.Inputs, baselines: Path | None, tracks: Tracks) -> None:
    """All steps of a run after its inputs are opened. Each adds its measurements to `context.result`."""
    tune, folder = context.settings.tune, context.folder
    tasks = scoring.load_tasks(context, opened)
    model = inputs.load_model(context, opened)
    baseline = scoring.measure_baseline(context, opened, model, tasks, baselines)

    quantized = quantization.quantize_model(context, opened, model)
    scoring.measure_quantized(context, opened, model, baseline)
    if tasks:
        tasks.measure("quantized", model)

    if tune:
        adapted = fine_tuning.add_adapters(context, opened, model, quantized, baseline, tune)
        fine_tuning.train_adapters(context, opened, adapted, tune, tracks)
        tuned = scoring.measure_tuned(context, opened, adapted, baseline)
        fine_tuning.write_card(context)
        if tasks:
            tasks.measure("tuned", adapted)
        fine_tuning.measure_merged(context, opened, adapted, quantized, baseline, tuned, tune)

    store.write(folder, context.result)
    with context.phases("report", "write the report"):
        page.write(folder, store.read(folder))
    tracks.result(context.metrics, tune.steps if tune else 0)
