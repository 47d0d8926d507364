"""Times a QLoRA training step of qbench and of PEFT with bitsandbytes, in turns.

Both train adapters of rank 16 on every linear layer except the head of a Llama with random weights. The layers are NF4
with double quantization and block 64, the model is bf16, the adapters fp32. There is no gradient checkpointing, and the
tokens are the same. Each side has its own process, so that memory is measured separately; while one takes a step the other
waits.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, get_scheduler

import formats
from qbench.errors import InputError
from qbench.measure.memory import PeakMemory
from qbench.model import quantizing
from qbench.model.replacement import replace_layers
from qbench.model.selection import linear_layers
from qbench.results.provenance import environment
from qbench.settings import SCHEDULES, TuneSettings
from qbench.system.extras import install_command
from qbench.training import adapters, optim
from qbench.training.loop import train

SEED, BATCH, BLOCK, DTYPE = 0, 4, 64, torch.bfloat16
#: by device: the shape of SmolLM-135M on a CPU, of Llama-3.2-1B on CUDA
SHAPES = {
    "cpu": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3},
    "cuda": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
}
WINDOW = {"cpu": 256, "cuda": 1024}

Advance = Callable[[int, float, float], None]  #: called with each step, its loss and tokens/s


def measure(device: torch.device, steps: int, report: Callable[[str], None], shape: dict | None = None) -> dict:
    """Time `steps` steps of each side, after one to warm up. report: called for every step, 2 · (steps + 1) times.
    shape: arguments of LlamaConfig, instead of the device's SHAPES.

    Returns {environment, model, tokens: of a step, ours, theirs, ratio: of their tokens_s}. A side has {loss: of every
    step, seconds: of every step but the first, tokens_s: the median, peak_bytes: while training}. On a CPU, peak_bytes is
    without the process's memory before the model. Raises InputError if bitsandbytes is missing.
    """
    if not find_spec("bitsandbytes"):
        raise InputError(f"step: bitsandbytes is not installed; {install_command('bnb')} brings it")
    shape, tokens = shape or SHAPES[device.type], BATCH * WINDOW[device.type]
    sides: dict[str, dict[str, Any]] = {side: {"loss": [], "seconds": []} for side in BUILD}
    with ExitStack() as stack:
        turns = {side: stack.enter_context(_run_process(side, device, shape, steps + 1)) for side in sides}
        for step in range(steps + 1):
            for side, turn in turns.items():
                turn.send("step")
                loss, tokens_s = turn.recv()
                sides[side]["loss"].append(loss)
                if step:
                    sides[side]["seconds"].append(tokens / tokens_s)
                report(f"{side}, step {step}: loss {loss:.3f}, {tokens_s:,.0f} tokens/s")
        for side, turn in turns.items():
            turn.send("end")
            sides[side]["peak_bytes"] = turn.recv()
    for timings in sides.values():
        timings["tokens_s"] = tokens / median(timings["seconds"])
    ratio = sides["ours"]["tokens_s"] / sides["theirs"]["tokens_s"]
    return {"environment": environment(device), "model": shape, "tokens": tokens, **sides, "ratio": ratio}


def summarize(result: dict) -> list[str]:
    """The results as Markdown list items."""
    ours, theirs, device = result["ours"], result["theirs"], result["environment"]["device"]
    return [
        f"- On {device} a step of {result['tokens']} tokens takes {median(ours['seconds']):.3g} s, with PEFT and"
        f" bitsandbytes {median(theirs['seconds']):.3g} s: {ours['tokens_s']:,.0f} tokens/s, {result['ratio']:.2f} times"
        f" their {theirs['tokens_s']:,.0f}.",
        f"- Its peak memory is {ours['peak_bytes'] / 2**30:.2f} GiB, theirs {theirs['peak_bytes'] / 2**30:.2f} GiB.",
        f"- The loss after {len(ours['loss'])} steps is {ours['loss'][-1]:.4f}, theirs {theirs['loss'][-1]:.4f}.",
    ]


@contextmanager
def _run_process(*arguments: object) -> Iterator[Connection]:
    """Run `_train` with the arguments in a process; yields the connection to it."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_train, args=(there, torch.get_num_threads(), *arguments), daemon=True)
    process.start()
    there.close()  # so that reading fails when the process ends
    try:
        yield here
    finally:
        process.terminate()
        process.join()


def _train(turn: Connection, threads: int, side: str, device: torch.device, shape: dict, steps: int) -> None:
    """Train one side in its own process: a step for each message, then send the peak memory."""
    import bitsandbytes  # noqa: F401  on both sides, so that the processes are alike

    torch.set_num_threads(threads)
    before = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    build, loop = BUILD[side]
    settings = TuneSettings(steps=steps, batch=BATCH)
    size = BATCH, WINDOW[device.type]
    windows = torch.randint(shape["vocab_size"], size, generator=torch.Generator().manual_seed(SEED))
    model = build(_build_llama(device, shape), settings)

    def advance(step: int, loss: float, tokens_s: float) -> None:
        turn.send((loss, tokens_s))
        turn.recv()

    turn.recv()
    with PeakMemory(device) as peak:
        loop(model, windows, settings, SEED, advance)
    turn.send(peak.bytes["allocated" if device.type == "cuda" else "rss"] - before)


def _build_llama(device: torch.device, shape: dict) -> PreTrainedModel:
    """A frozen model with random weights."""
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=WINDOW[device.type])
    torch.manual_seed(SEED)
    with device:
        model = LlamaForCausalLM(config)
    model.to(DTYPE)  # type: ignore[arg-type]  # the wrapper of transformers hides the arguments
    return model.requires_grad_(False)


def _build_ours(model: PreTrainedModel, settings: TuneSettings) -> nn.Module:
    packed = quantizing.quantize(linear_layers(model), formats.get("nf4", block=BLOCK, dq=True))
    replace_layers(model, packed)
    return adapters.add(model, list(packed), settings, SEED)


def _build_theirs(model: PreTrainedModel, settings: TuneSettings) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layers = linear_layers(model)
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)  # a Llama has no other kind
        packed = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=DTYPE, device="meta")
        packed.weight = Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", blocksize=BLOCK, compress_statistics=True
        )
        model.set_submodule(name, packed.to(layer.weight.device))  # this quantizes
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # typed int by PEFT, which accepts floats
        target_modules=list(layers),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def _reference_loop(model: nn.Module, windows: Tensor, settings: TuneSettings, seed: int, advance: Advance) -> None:
    """The same training as `loop.train` with a single batch, as usually written, with the loss of transformers."""
    windows = windows.to(next(model.parameters()).device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.build(settings.optimizer, parameters, settings.lr, settings.weight_decay)
    warmup = min(settings.warmup, settings.steps - 1)
    schedule = get_scheduler(SCHEDULES[settings.schedule], optimizer, warmup, settings.steps)
    model.train()
    for step in range(settings.steps):
        started = time.perf_counter()
        loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        norm.item()  # waits for the device
        advance(step + 1, loss.item(), windows.numel() / (time.perf_counter() - started))


Build = Callable[[PreTrainedModel, TuneSettings], nn.Module]
#: for each side, the function that prepares a model, and its loop, with the arguments of `_reference_loop`
BUILD: dict[str, tuple[Build, Callable[..., object]]] = {
    "ours": (_build_ours, train),
    "theirs": (_build_theirs, _reference_loop),
}
