"""lm-eval's tasks on a model that is in memory. Documents, requests, filters and metrics are lm-eval's own.

To import this takes seconds: it imports lm-eval.
"""

import functools
import io
import logging
import math
import os
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval.tasks
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.tasks import TaskManager
from torch import Tensor, nn
from torch.utils import collect_env
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qbench.errors import InputError

from .task_files import place, unknown
from .task_scores import TaskScores

BOOTSTRAPS = 1000  #: draws for the standard error of a metric that has none in closed form
# takes seconds, and lm-eval tells it in every result
_environment = functools.cache(collect_env.get_pretty_env_info)


@dataclass
class Tasks:
    """top: what was asked for, tasks and groups of them. leaves: every task, by its name. groups: the names of all tasks
    of each group. inside: the group that a task or group is in."""

    top: list[Task | Group] = field(default_factory=list)
    leaves: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    inside: dict[str, str] = field(default_factory=dict)

    def documents(self, limit: int | None = None) -> int:
        """How many there are, at most `limit` of each task."""
        return sum(min(len(task.eval_docs), limit or len(task.eval_docs)) for task in self.leaves.values())


def load(entries: Sequence[str], scratch: Path | None = None) -> Tasks:
    """The tasks of entries such as those of `eval.tasks`, with their documents.

    The network, and the hub's cache, are used for a task whose data are on the hub and for no other. Local data are read
    by way of a folder in `scratch`, or in the system's for temporary files, that is removed. Raises InputError.
    """
    tasks = Tasks()
    with _apart(), patch.object(datasets, "load_dataset", functools.partial(_dataset, datasets.load_dataset, scratch)):
        for entry in entries:
            try:
                found = _load(entry)
            except (InputError, MemoryError):
                raise
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                raise unknown(entry, f"could not be loaded ({type(error).__name__}: {reason})") from error
            _add(tasks, found, entry)
    return tasks


def _load(entry: str) -> dict:
    path = place(entry)
    if path is None:
        files = (file for file in Path(lm_eval.tasks.__file__).parent.rglob("*") if file.is_file())
        if not any(entry.encode() in file.read_bytes() for file in files):  # in a second, where the index takes ten
            raise unknown(entry)
        manager = TaskManager()
        if entry not in manager.task_index:
            raise unknown(entry)
        return manager.load([entry])
    if path.is_dir():
        manager = TaskManager(include_path=path, include_defaults=False)
        if not manager.all_subtasks:
            raise unknown(entry, "holds no task that lm-eval can read")
        return manager.load(manager.all_subtasks)
    group = bool(re.search(r"^group\s*:", path.read_text("utf-8"), re.MULTILINE))  # it may name any task of lm-eval's
    return TaskManager(include_path=path.parent if group else None, include_defaults=group).load([str(path)])


def _dataset(
    load_dataset: Callable, scratch: Path | None, path: str, *args: Any, **options: Any
) -> datasets.DatasetDict:
    """`load_dataset`, which for local files would leave a copy of them in the home directory."""
    local = Path(path).exists() or ("/" not in path and {"data_files", "data_dir"} & options.keys())
    if not local:
        return load_dataset(path, *args, **options)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".datasets.") as folder:
        return load_dataset(path, *args, **{**options, "cache_dir": folder, "keep_in_memory": True})


def _add(tasks: Tasks, found: dict, entry: str) -> None:
    groups = found.get("groups") or {}
    for name, task in found["tasks"].items():
        if name in tasks.leaves:
            raise InputError(f"eval.tasks: {entry!r} has {name} once more; accepted: tasks of different names")
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise InputError(
                f"eval.tasks: {name!r} runs what the model writes, or shows it more than text; others are accepted"
            )
        tasks.leaves[name] = task
    tasks.inside |= {child: name for name, group in groups.items() for child in group.child_names}
    tasks.groups |= {name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()}
    tasks.top += [item for name, item in (groups | found["tasks"]).items() if name not in tasks.inside]


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks | Sequence[str],
    limit: int | None = None,
    batch: int = 8,
    advance: Callable[[float], None] = lambda documents: None,
) -> TaskScores:
    """Score a causal LM, whatever its layers and adapters, as `lm_eval --model hf` does.

    limit: the first documents of each task, None all. batch: requests at once; another number moves scores in their last
    digits. advance: is told of documents done. The log-likelihoods are taken in fp32 from logits in the model's dtype, as
    lm-eval does with softmax_dtype=float32. Unlike there, no text begins with two beginning-of-text tokens. Raises
    InputError for a tokenizer that does not fit the model.
    """
    tasks = tasks if isinstance(tasks, Tasks) else load(tasks)
    device = next(model.parameters()).device
    with _apart(device):
        lm = _Live(model, tokenizer, batch, advance)
        results = evaluator.simple_evaluate(
            model=lm,
            tasks=list(tasks.top),
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            batch_size=batch,
            device=str(device),
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
        )
    return TaskScores(results, results.pop("samples"))


def check(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a tokenizer with which lm-eval scores nothing."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            "eval.tasks: the model's tokenizer has no token that begins or ends a text, which lm-eval puts before one;"
            " accepted: none, or a tokenizer with a bos_token or an eos_token"
        )


class _Live(HFLM):
    """lm-eval's view of a model, which tells of the documents it is done with. No text begins twice."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: int, advance: Callable[[float], None]
    ):
        check(tokenizer)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch, softmax_dtype="float32")
        self._vocabulary = self.config.get_text_config().vocab_size
        adapter = getattr(model, "active_peft_config", None)
        if adapter and adapter.is_prompt_learning:  # virtual tokens take positions
            self._max_length = self.max_length - adapter.num_virtual_tokens
        self._advance, self._share = advance, 0.0

    def _expect(self, requests: list[Instance], rows: int) -> None:
        self._share = len({(request.task_name, request.doc_id) for request in requests}) / rows

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._expect(requests, len(requests))
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        # lm-eval puts the beginning of text before what `tok_encode` makes, though that begins with one already
        with patch.object(self, "tok_encode", self._encode_rest):
            windows = [math.ceil(len(self.tok_encode(request.args[0])) / self.max_length) for request in requests]
            self._expect(requests, sum(windows))
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def _encode_rest(self, text: str) -> list[int]:
        """The tokens of a text but the one that begins it."""
        tokens = super().tok_encode(text)
        return tokens[1:] if tokens[:1] == [self.prefix_token_id] else tokens

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        # lm-eval asks the first alone whether all bring their beginning along
        if len({has_bos_prefix(text, self.tokenizer.bos_token) for text in strings}) == 1:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, **options)
        rows = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._expect(requests, len(requests))
        return super().generate_until(requests, disable_tqdm)

    def _model_call(self, inps: Tensor, *args: Any, **options: Any) -> Tensor:
        self._check(inps)
        logits = super()._model_call(inps, *args, **options)
        self._advance(self._share * len(inps))
        return logits

    def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Tensor:
        self._check(context)
        tokens = super()._model_generate(context, *args, **options)
        self._advance(self._share * len(context))
        return tokens

    def _check(self, tokens: Tensor) -> None:
        if (largest := int(tokens.max())) >= self._vocabulary:
            raise InputError(
                f"model.path: its tokenizer makes token {largest} of a task's text, but the model knows"
                f" {self._vocabulary} tokens"
            )


@contextmanager
def _apart(device: torch.device | None = None) -> Iterator[None]:
    """lm-eval without its voice, and without its hand on the seeds of whoever calls it, nor processes of its own."""
    bar, disabled, states = tqdm.__init__, logging.root.manager.disable, (random.getstate(), np.random.get_state())

    def silent(self: tqdm, *args: Any, **options: Any) -> None:
        bar(self, *args, **options | {"disable": True})

    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(io.StringIO()),
            patch.object(tqdm, "__init__", silent),
            patch.object(collect_env, "get_pretty_env_info", _environment),
            # of the working directory, where there may be none, and git says so aloud
            patch.object(evaluator, "get_git_commit_hash", lambda: None),
            patch.dict(os.environ, DISABLE_MULTIPROC="1"),
            torch.random.fork_rng([device] if device and device.type == "cuda" else []),
        ):
            yield
    finally:
        logging.disable(disabled)
        random.setstate(states[0])
        np.random.set_state(states[1])
