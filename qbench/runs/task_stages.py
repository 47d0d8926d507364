"""lm-eval tasks in a run: scored on the baseline, the quantized model and the fine-tuned one."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedTokenizerBase

from .context import RunContext

if TYPE_CHECKING:
    from qbench.measure.task_scores import TaskScores

FOLDER = "lm_eval"  #: in a run's folder: a JSON file for each stage, and the samples of each task


class TaskStages:
    """The tasks of a run with their documents.

    A stage is `baseline`, `quantized` or `tuned`. Creating an instance takes seconds: it imports lm-eval.
    Raises InputError.
    """

    def __init__(self, context: RunContext, tokenizer: PreTrainedTokenizerBase):
        self.context, self.tokenizer = context, tokenizer
        with context.phases("tasks", "load the tasks"):
            from qbench.measure import tasks  # here, because most runs need no lm-eval

            self.lm_eval = tasks
            tasks.check_tokenizer(tokenizer)
            self.tasks = tasks.load(context.settings.eval.tasks, context.folder)

    def score_baseline(self, model: nn.Module, folder: Path) -> None:
        """Score the 16-bit model, and save its scores in `folder`, from which `take_baseline` reads them."""
        shutil.rmtree(folder / FOLDER, ignore_errors=True)  # of an earlier run
        self._score("baseline", model, folder)

    def take_baseline(self, folder: Path) -> None:
        """Take the baseline's scores from `folder`, which may be another run's, into this run."""
        own = self.context.folder
        if folder != own:
            shutil.rmtree(own / FOLDER, ignore_errors=True)  # of an earlier run
            shutil.copytree(folder / FOLDER, own / FOLDER)
        self.context.metrics["tasks"] = {"baseline": self._read("baseline").metrics(self.tasks, None)}

    def measure(self, stage: str, model: nn.Module) -> None:
        """Score a model, and compare it with the baseline."""
        self._score(stage, model, self.context.folder)
        scores = self._read(stage).metrics(self.tasks, self._read("baseline"))
        self.context.metrics["tasks"][stage] = scores

    def _score(self, stage: str, model: nn.Module, folder: Path) -> None:
        settings = self.context.settings.eval
        count = self.tasks.count_documents(settings.limit)
        with self.context.phases(f"tasks_{stage}", f"tasks of the {stage} model", count) as advance:
            scores = self.lm_eval.evaluate(model, self.tokenizer, self.tasks, settings.limit, settings.batch, advance)
        scores.save(folder / FOLDER, stage)

    def _read(self, stage: str) -> "TaskScores":
        return self.lm_eval.TaskScores.read(self.context.folder / FOLDER, stage)
