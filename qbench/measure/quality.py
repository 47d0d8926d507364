"""Quality on held-out text: negative log-likelihood, and the distance from the baseline, token by token.

The baseline's logits are stored on disk in the model's dtype, without rounding. Every later model is compared with them
on the same tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formats.contract import first_line
from qbench.errors import InputError
from qbench.model.devices import dtype_name
from qbench.training.losses import logits_of

from .statistics import clustered_mean, nll_difference

BATCH_LOGITS = 2**24  #: about this many logits in a batch: 64 MiB in fp32


@dataclass
class Scores:
    """Scores of each token. nll: fp32 [windows, seq − 1], nats.

    If compared with the baseline: kl (nats), and agree (the most probable token is the same), of the same shape.
    """

    nll: np.ndarray
    kl: np.ndarray | None = None
    agree: np.ndarray | None = None

    def metrics(self, baseline: "Scores | None" = None) -> dict:
        """nll (nats a token), its stderr, perplexity, tokens, and windows, the mean nll of each window.

        With a baseline also against_baseline: the paired delta_nll, stderr and p, and kl_mean, kl_p99, top1_agreement.
        """
        nll, stderr = clustered_mean(self.nll)
        result: dict[str, Any] = {
            "nll": nll,
            "perplexity": math.exp(min(nll, 700)),
            "stderr": stderr,
            "tokens": self.nll.size,
            "windows": self.nll.mean(1, dtype=np.float64).tolist(),
        }
        if baseline is not None:
            assert self.kl is not None and self.agree is not None, "these scores have no baseline"
            result["against_baseline"] = {
                **nll_difference(self.nll, baseline.nll),
                "kl_mean": float(self.kl.mean(dtype=np.float64)),
                "kl_p99": float(np.quantile(self.kl, 0.99)),
                "top1_agreement": float(self.agree.mean()),
            }
        return result


class BaselineLogits:
    """A file of the baseline's logits [windows, seq − 1, vocabulary], in the model's dtype.

    dtype, shape: of one window, to read a file that is already written.
    """

    def __init__(self, file: BufferedIOBase, dtype: torch.dtype | None = None, shape: Sequence[int] = ()):
        self._file, self._dtype, self._shape = file, dtype, tuple(shape)

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """The dtype and shape of one window."""
        assert self._dtype, "no logits have been written"
        return dtype_name(self._dtype), self._shape

    def write(self, logits: Tensor) -> None:
        """Append logits [windows, seq − 1, vocabulary]. Raises OSError if the disk is full."""
        self._dtype, self._shape = logits.dtype, tuple(logits.shape[1:])
        self._file.write(logits.cpu().contiguous().view(torch.uint8).numpy().data)

    def read(self, first: int, windows: int) -> Tensor:
        """The logits of `windows` windows, from number `first` on."""
        assert self._dtype is not None, "nothing has been written"
        window = math.prod(self._shape) * self._dtype.itemsize
        self._file.seek(first * window)
        raw = bytearray(windows * window)
        if self._file.readinto(raw) != len(raw):
            raise OSError("the logits of the baseline are cut short")
        return torch.frombuffer(raw, dtype=self._dtype).view(windows, *self._shape)

    def close(self) -> None:
        self._file.close()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) [...], nats, from log-probabilities [..., vocabulary]; tokens with p = 0 add nothing."""
    terms = log_p.exp() * (log_p - log_q)
    return terms.where(log_p > -torch.inf, 0).sum(-1).clamp_(min=0)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    windows: Tensor,
    baseline: BaselineLogits | None = None,
    is_baseline: bool = False,
    advance: Callable[[int], None] = lambda windows: None,
) -> Scores:
    """Score a model on windows [n, seq] of tokens; the first token of each has no score.

    baseline: the file of the baseline's logits. With `is_baseline` this model's logits are written to it; otherwise the
    model is compared with them. Without a file only the nll is computed. Raises FloatingPointError if an nll is not
    finite.
    """
    device = next(model.parameters()).device
    n, seq = windows.shape
    nll, kl, agree = (np.zeros((n, seq - 1), t) for t in (np.float32, np.float32, bool))
    config: Any = model.config  # transformers and PEFT models have it
    batch = max(1, BATCH_LOGITS // (seq * config.get_text_config().vocab_size))
    for first in range(0, n, batch):
        tokens = windows[first : first + batch].to(device)
        logits = logits_of(model, tokens)[:, :-1]
        rows = slice(first, first + len(tokens))
        log_p = logits.float().log_softmax(-1)
        nll[rows] = -log_p.gather(-1, tokens[:, 1:, None])[..., 0].cpu()
        if baseline and is_baseline:
            baseline.write(logits)
        elif baseline:
            reference = baseline.read(first, len(tokens)).to(device).float().log_softmax(-1)
            agree[rows] = (reference.argmax(-1) == log_p.argmax(-1)).cpu()
            kl[rows] = kl_divergence(reference, log_p).cpu()
        advance(len(tokens))
    if not np.isfinite(nll).all():
        raise FloatingPointError(f"the model gives {int((~np.isfinite(nll)).sum())} tokens no finite likelihood")
    return Scores(nll, kl, agree) if baseline and not is_baseline else Scores(nll)


@torch.inference_mode()
def check_logits(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Raises InputError for a model that needs more than tokens [n, seq], such as an encoder's states."""
    try:
        logits_of(model, tokens.to(model.device))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        kind = type(model).__name__
        raise InputError(
            f"model.path: a {kind} gives no logits of tokens alone: {first_line(error)}; accepted: a model that does"
        ) from error
