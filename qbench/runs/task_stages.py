"""lm-eval's tasks in a run: on the 16-bit baseline, the quantized model, the tuned one."""

import shutil
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from qbench.settings import EvalSettings

from .progress import Phases

FOLDER = "lm_eval"  #: in a run's, what lm-eval found: a JSON file a stage, and the samples of each task


class TaskStages:
    """The tasks of a run with their documents, and what the baseline scored on them.

    To make one takes seconds: it imports lm-eval. Raises InputError.
    """

    def __init__(self, settings: EvalSettings, folder: Path, phases: Phases, tokenizer: PreTrainedTokenizerBase):
        self.settings, self.folder, self.phases = settings, folder, phases
        with phases("tasks", "load the tasks"):
            from qbench.measure import tasks  # not above: most runs do without lm-eval

            self.lm_eval = tasks
            tasks.check(tokenizer)
            self.tasks = tasks.load(settings.tasks, folder)

    def score(
        self, stage: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None
    ) -> None:
        """Run the tasks on a model, and leave what lm-eval found in `folder`, by default the run's."""
        place = (folder or self.folder) / FOLDER
        if stage == "baseline":
            shutil.rmtree(place, ignore_errors=True)  # of a run before
        count, settings = self.tasks.documents(self.settings.limit), self.settings
        with self.phases(f"tasks_{stage}", f"tasks of the {stage} model", count) as advance:
            found = self.lm_eval.evaluate(model, tokenizer, self.tasks, settings.limit, settings.batch, advance)
        found.save(place, stage)

    def take_baseline(self, folder: Path) -> None:
        """Have what `score` left of the baseline in another run's folder in this one's."""
        if folder != self.folder:
            shutil.rmtree(self.folder / FOLDER, ignore_errors=True)  # of a run before
            shutil.copytree(folder / FOLDER, self.folder / FOLDER)

    def metrics(self, stage: str) -> dict:
        """What was scored at a stage, and after the baseline against it."""
        found, baseline = (self.lm_eval.TaskScores.read(self.folder / FOLDER, name) for name in (stage, "baseline"))
        return found.metrics(self.tasks, None if stage == "baseline" else baseline)
