"""Throughput, as a median and its raw samples, whose number and spread show how reliable it is."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from formats import Format, QuantizedTensor
from formats.contract import first_line
from qbench.model.selection import weight_of

ROWS = (1, 4, 16, 64)  #: tokens at once, for `by_rows`
#: what models call their cache: in transformers 5.24 and later, before that, in Mamba, in RWKV
CACHES = ("cache", "past_key_values", "cache_params", "state")


def summarize(samples: list[float]) -> dict:
    return {"median": statistics.median(samples), "samples": samples}


def _measure_rates(device: torch.device, work: Callable[[], None], amount: float, repeats: int) -> dict:
    """The rates of `work`, as `amount` per second: `repeats` samples, after one call to warm up."""
    work()
    samples = []
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        samples.append(amount / (time.perf_counter() - started))
    return summarize(samples)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantize_rates(
    layers: Mapping[str, nn.Module],
    packed: dict[str, QuantizedTensor],
    fmt: Format,
    dtype: torch.dtype,
    repeats: int = 3,
) -> dict:
    """Weights a second to quantize, and to dequantize to `dtype`, over all layers."""
    device = next(iter(packed.values())).device
    count = sum(q.numel for q in packed.values())

    def quantize() -> None:
        for layer in layers.values():
            fmt.quantize(weight_of(layer))

    def dequantize() -> None:
        for q in packed.values():
            q.dequantize(dtype)

    return {
        "quantize_weights_s": _measure_rates(device, quantize, count, repeats),
        "dequantize_weights_s": _measure_rates(device, dequantize, count, repeats),
    }


@torch.inference_mode()
def generation_rates(model: nn.Module, window: Tensor, prefills: int = 5, decodes: int = 16) -> dict:
    """Tokens a second of one sequence, window [seq]: prefill of all of it, and greedy decoding after its first half.

    by_rows: prefill of the first M tokens, for M in ROWS and the whole window; each weight is multiplied with M rows.
    untimed: the reason for each rate that is None. Decoding cannot be timed without a KV cache.
    """
    device = next(model.parameters()).device
    prompt = window[None].to(device)

    def prefill_rate(rows: int) -> dict:
        return _measure_rates(device, lambda: model(input_ids=prompt[:, :rows], use_cache=False), rows, prefills)

    prefill = prefill_rate(prompt.shape[1])
    by_rows = [{"rows": rows, **prefill_rate(rows)} for rows in ROWS if rows < prompt.shape[1]]
    rates = {"prefill_tokens_s": prefill, "by_rows": [*by_rows, {"rows": prompt.shape[1], **prefill}]}
    try:
        return {**rates, "decode_tokens_s": _decode_rate(model, prompt, decodes)}
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a model may raise anything for a cache that it does not support
        return {**rates, "decode_tokens_s": None, "untimed": {"decode_tokens_s": first_line(error)}}


def _decode_rate(model: nn.Module, prompt: Tensor, decodes: int) -> dict:
    """Time greedy decoding, token by token. Raises ValueError if the model gives no cache to continue from."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:  # only `generate` supports decoding with them
        raise ValueError("PEFT puts virtual tokens before each call")
    half = max(1, prompt.shape[1] // 2)
    out = model(input_ids=prompt[:, :half], use_cache=True)
    cache = next((name for name in CACHES if out.get(name) is not None), None)
    if cache is None:
        raise ValueError(f"a {type(model).__name__} gives no cache to go on from")
    samples = []
    for _ in range(min(decodes + 1, max(2, half))):
        _synchronize(prompt.device)
        started = time.perf_counter()
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, use_cache=True, **{cache: out[cache]})
        _synchronize(prompt.device)
        samples.append(1 / (time.perf_counter() - started))
    return summarize(samples[1:])
