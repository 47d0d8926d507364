"""Runs lm-eval's tasks on a model in memory. Documents, requests, filters and metrics are lm-eval's own.

Importing this takes seconds, because it imports lm-eval.
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
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval.tasks
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.tasks import TaskManager
from torch import Tensor, nn
from torch.utils import collect_env
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qbench.errors import InputError

from .task_files import bad_entry, find_file
from .task_scores import Tasks, TaskScores

BOOTSTRAPS = 1000  #: draws for the standard error of a metric without a closed form
# cached because it takes seconds, and lm-eval asks for it at every evaluation
_environment_info = functools.cache(collect_env.get_pretty_env_info)


def load(entries: Sequence[str], scratch: Path | None = None) -> Tasks:
    """Load the tasks of entries such as those of `eval.tasks`, with their documents.

    The network and the hub's cache are used only for tasks whose data are on the hub. Local data are read through a
    temporary folder in `scratch`, or in the system's temporary folder. Raises InputError.
    """
    tasks = Tasks()
    with (
        _isolated(),
        patch.object(datasets, "load_dataset", functools.partial(_load_dataset, datasets.load_dataset, scratch)),
    ):
        for entry in entries:
            try:
                loaded = _load_entry(entry)
            except (InputError, MemoryError):
                raise
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                raise bad_entry(entry, f"could not be loaded ({type(error).__name__}: {reason})") from error
            _add_loaded(tasks, loaded, entry)
    return tasks


def _load_entry(entry: str) -> dict:
    """The tasks and groups of an entry, as lm-eval's TaskManager returns them."""
    path = find_file(entry)
    if path is None:
        files = (file for file in Path(lm_eval.tasks.__file__).parent.rglob("*") if file.is_file())
        if not any(entry.encode() in file.read_bytes() for file in files):  # takes a second; the index takes ten
            raise bad_entry(entry)
        manager = TaskManager()
        if entry not in manager.task_index:
            raise bad_entry(entry)
        return manager.load([entry])
    if path.is_dir():
        manager = TaskManager(include_path=path, include_defaults=False)
        if not manager.all_subtasks:
            raise bad_entry(entry, "holds no task that lm-eval can read")
        return manager.load(manager.all_subtasks)
    # a group may name any of lm-eval's tasks
    group = bool(re.search(r"^group\s*:", path.read_text("utf-8"), re.MULTILINE))
    return TaskManager(include_path=path.parent if group else None, include_defaults=group).load([str(path)])


def _load_dataset(
    load_dataset: Callable, scratch: Path | None, path: str, *args: Any, **options: Any
) -> datasets.DatasetDict:
    """`load_dataset`, without the copy of local files that it would leave in the home directory."""
    local = Path(path).exists() or ("/" not in path and {"data_files", "data_dir"} & options.keys())
    if not local:
        return load_dataset(path, *args, **options)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".datasets.") as folder:
        return load_dataset(path, *args, **{**options, "cache_dir": folder, "keep_in_memory": True})


def _add_loaded(tasks: Tasks, loaded: dict, entry: str) -> None:
    """Add the tasks and groups of one entry to `tasks`."""
    groups = loaded.get("groups") or {}
    for name, task in loaded["tasks"].items():
        if name in tasks.leaves:
            raise InputError(f"eval.tasks: {entry!r} has {name} once more; accepted: tasks of different names")
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise InputError(
                f"eval.tasks: {name!r} runs what the model writes, or shows it more than text; others are accepted"
            )
        tasks.leaves[name] = task
    tasks.parents |= {child: name for name, group in groups.items() for child in group.child_names}
    tasks.groups |= {name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()}
    tasks.top += [item for name, item in (groups | loaded["tasks"]).items() if name not in tasks.parents]


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks | Sequence[str],
    limit: int | None = None,
    batch: int = 8,
    advance: Callable[[float], None] = lambda documents: None,
) -> TaskScores:
    """Score a causal LM, with any layers and adapters, as `lm_eval --model hf` does.

    limit: use the first `limit` documents of each task; None uses all. batch: requests at once, which changes the last
    digits of scores. advance: called with the number of documents done, which may be a fraction.

    Log-likelihoods are computed in fp32 from logits in the model's dtype, as with lm-eval's softmax_dtype=float32. Unlike
    in lm-eval, no text begins with two beginning-of-text tokens. Raises InputError for a tokenizer that does not fit the
    model.
    """
    tasks = tasks if isinstance(tasks, Tasks) else load(tasks)
    device = next(model.parameters()).device
    with _isolated(device):
        lm = _LiveModel(model, tokenizer, batch, advance)
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


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a tokenizer that lm-eval cannot use."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            "eval.tasks: the model's tokenizer has no token that begins or ends a text, which lm-eval puts before one;"
            " accepted: none, or a tokenizer with a bos_token or an eos_token"
        )


class _LiveModel(HFLM):
    """lm-eval's wrapper of a model in memory. It reports progress, and no text gets two beginning-of-text tokens."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: int, advance: Callable[[float], None]
    ):
        check_tokenizer(tokenizer)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch, softmax_dtype="float32")
        self._vocabulary = self.config.get_text_config().vocab_size
        adapter = getattr(model, "active_peft_config", None)
        if adapter and adapter.is_prompt_learning:  # virtual tokens take positions
            self._max_length = self.max_length - adapter.num_virtual_tokens
        self._advance, self._documents_per_row = advance, 0.0

    def _count_documents_per_row(self, requests: list[Instance], rows: int) -> None:
        """Set how many documents each of the `rows` rows counts for, for the progress."""
        self._documents_per_row = len({(request.task_name, request.doc_id) for request in requests}) / rows

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._count_documents_per_row(requests, len(requests))
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        # lm-eval prepends a beginning-of-text token to the tokens, even if they already begin with one
        with patch.object(self, "tok_encode", self._encode_without_prefix):
            windows = [math.ceil(len(self.tok_encode(request.args[0])) / self.max_length) for request in requests]
            self._count_documents_per_row(requests, sum(windows))
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def _encode_without_prefix(self, text: str) -> list[int]:
        """The tokens of a text, without a beginning-of-text token."""
        tokens = super().tok_encode(text)
        return tokens[1:] if tokens[:1] == [self.prefix_token_id] else tokens

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        # lm-eval looks only at the first string to decide whether to add beginning-of-text tokens to all
        if len({has_bos_prefix(text, self.tokenizer.bos_token) for text in strings}) == 1:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, **options)
        rows = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._count_documents_per_row(requests, len(requests))
        return super().generate_until(requests, disable_tqdm)

    def _model_call(self, inps: Tensor, *args: Any, **options: Any) -> Tensor:
        self._check_vocabulary(inps)
        logits = super()._model_call(inps, *args, **options)
        self._advance(self._documents_per_row * len(inps))
        return logits

    def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Tensor:
        self._check_vocabulary(context)
        tokens = super()._model_generate(context, *args, **options)
        self._advance(self._documents_per_row * len(context))
        return tokens

    def _check_vocabulary(self, tokens: Tensor) -> None:
        if (largest := int(tokens.max())) >= self._vocabulary:
            raise InputError(
                f"model.path: its tokenizer makes token {largest} of a task's text, but the model knows"
                f" {self._vocabulary} tokens"
            )


@contextmanager
def _isolated(device: torch.device | None = None) -> Iterator[None]:
    """Run lm-eval without output and child processes, and restore the caller's random state."""
    tqdm_init, logging_level = tqdm.__init__, logging.root.manager.disable
    states = random.getstate(), np.random.get_state()

    def silent(self: tqdm, *args: Any, **options: Any) -> None:
        tqdm_init(self, *args, **options | {"disable": True})

    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(io.StringIO()),
            patch.object(tqdm, "__init__", silent),
            patch.object(collect_env, "get_pretty_env_info", _environment_info),
            # the working directory may be no git repository, and then git prints an error
            patch.object(evaluator, "get_git_commit_hash", lambda: None),
            patch.dict(os.environ, DISABLE_MULTIPROC="1"),
            torch.random.fork_rng([device] if device and device.type == "cuda" else []),
        ):
            yield
    finally:
        logging.disable(logging_level)
        random.setstate(states[0])
        np.random.set_state(states[1])
