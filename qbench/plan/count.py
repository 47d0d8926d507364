"""A plan: every line of a step's memory in bytes, at each of its moments, and their sum.

Weights, scales, adapters and states are arithmetic: `Format.count_bytes` of each layer that a run would quantize, and
bytes a parameter for the rest. What comes and goes within a step is counted on the step itself (`step`). The peak of the
plan is the largest sum over the moments, not the sum of the largest lines: the activations of the forward and the
gradients of the backward's end are never there together.
"""

from dataclasses import dataclass

from formats.packing import packed_bytes
from qbench.errors import InputError
from qbench.training.optim.states import MIN_8BIT

from . import step
from .settings import PlanSettings
from .shapes import Shape, Sizes

NESTED = 256  # weights under one scale of an 8-bit state, as in bitsandbytes

HELD = ("weights", "scales", "embeddings", "head", "norms", "others")  #: lines of the model itself
#: what each line is, in the order of a table
LINES = {
    "weights": "weights of linear layers",
    "scales": "their scales and tables",
    "embeddings": "embeddings",
    "head": "output head",
    "norms": "norms and biases",
    "others": "weights in no linear layer",
    "adapters": "adapters",
    "gradients": "gradients",
    "states": "optimizer states",
    "copies": "optimizer's copies",
    "activations": "activations",
    "logits": "logits and loss",
    "decoded": "decoded layer, transient",
    "context": "CUDA context",
    "fragmentation": "fragmentation",
}


@dataclass(frozen=True)
class Plan:
    """moments: by moment of the step, the bytes of each line. paged: bytes of states that may wait in host memory, and are
    in no line. trainable: parameters. linear: weights of the linear layers.
    """

    shape: Shape
    settings: PlanSettings
    moments: dict[str, dict[str, int]]
    paged: int
    trainable: int
    linear: int
    parameters: int

    def total(self, moment: str) -> int:
        return sum(self.moments[moment].values())

    @property
    def peak(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=self.total)

    @property
    def needed(self) -> int:
        return self.total(self.peak)

    @property
    def margin(self) -> int | None:
        """What the GPU has beyond what is needed; below zero where it does not fit; None without a GPU."""
        return None if self.settings.gpu is None else self.settings.gpu - self.needed

    @property
    def fits(self) -> bool:
        """Whether the GPU has what is needed; true without one."""
        return self.margin is None or self.margin >= 0

    @property
    def in_host(self) -> int:
        """Bytes of paged states for which the GPU has no room at the peak."""
        return 0 if self.margin is None else min(self.paged, max(0, self.paged - self.margin))

    @property
    def bits(self) -> float:
        """A parameter of the linear layers, scales and tables included."""
        line = self.moments[self.peak]
        return 8 * (line["weights"] + line["scales"]) / self.linear


def count(shape: Shape, settings: PlanSettings) -> Plan:
    """The plan of a step. Raises InputError for what the model or the settings do not allow."""
    shape.check_seq(settings.seq)
    dtype, sizes = settings.dtype, shape.sizes
    trained = _trained(sizes, settings)
    held = _weights(sizes, settings) | {
        "embeddings": sum(sizes.embeddings) * dtype.of("embeddings").itemsize,
        "head": sum(sizes.head) * dtype.of("head").itemsize,
        "norms": sum(sizes.norms) * dtype.of("norms").itemsize + sizes.buffers,
        "others": sum(sizes.others) * dtype.of("compute").itemsize,
        "adapters": sum(trained) * dtype.of("adapters").itemsize if settings.method == "lora" else 0,
    }
    states = {n: _state_bytes(n, settings) for n in set(trained)}
    paged = sum(states[n] for n in trained) if settings.paged else 0
    held["states"] = sum(states[n] for n in trained) - paged
    in_training = dtype.of("adapters" if settings.method == "lora" else "compute")
    gradient = dtype.of("gradients") if dtype.gradients else in_training
    moments = {}
    for moment, found in _within(step.peaks(shape, settings)).items():
        moments[moment] = _lines(settings, held | found)
    if settings.trains:
        last = {"gradients": sum(trained) * gradient.itemsize, "copies": step.copies(trained, settings)}
        moments[step.STEP] = _lines(settings, held | last)
    linear = sum(size.numel() for size in sizes.layers.values())
    return Plan(shape, settings, moments, paged, sum(trained), linear, sum(sizes.all))


def _within(peaks: step.Peaks) -> dict[str, dict[str, int]]:
    """The most that is alive within each moment, by kind."""
    within = {moment: [peaks[label] for label in labels if label in peaks] for moment, labels in step.MOMENTS.items()}
    return {moment: max(found, key=lambda kinds: sum(kinds.values())) for moment, found in within.items() if found}


def _lines(settings: PlanSettings, found: dict[str, int]) -> dict[str, int]:
    lines = dict.fromkeys(LINES, 0) | found
    lines["fragmentation"] = round(sum(lines.values()) * settings.fragmentation_percent / 100)
    lines["context"] = settings.context_bytes
    return lines


def _weights(sizes: Sizes, settings: PlanSettings) -> dict[str, int]:
    """Bytes of codes, and of what else the format stores, as `Format.count_bytes` has it for each layer."""
    numels, fmt = [size.numel() for size in sizes.layers.values()], settings.format
    if settings.method == "full":
        return {"weights": sum(numels) * settings.dtype.of("compute").itemsize, "scales": 0}
    total, codes = sum(map(fmt.count_bytes, numels)), sum(packed_bytes(n, fmt.bits) for n in numels)
    return {"weights": codes, "scales": total - codes}


def _trained(sizes: Sizes, settings: PlanSettings) -> list[int]:
    """Elements of each tensor that is trained. Raises InputError for a rank larger than a layer."""
    if settings.method == "full":
        return sizes.all
    if settings.method == "none":
        return []
    numels = []
    for name in step.targets(list(sizes.layers), settings.targets):
        out_features, in_features = sizes.layers[name]
        most = min(out_features, in_features)
        if most == 1:  # a gate, which no adapter goes on
            continue
        if settings.rank > most:
            raise InputError(
                f"rank: {settings.rank} is larger than {name}, {out_features} × {in_features}; accepted: 1 to {most}"
            )
        numels += [settings.rank * out_features, settings.rank * in_features]
    return numels


def _state_bytes(n: int, settings: PlanSettings) -> int:
    """Of a trained tensor with n elements: two moments of Adam, none of SGD, which has no momentum here."""
    if settings.optimizer == "sgd":
        return 0
    if settings.optimizer.endswith("8bit") and n >= MIN_8BIT:
        return 2 * (n + 4 * -(n // -NESTED))
    return 2 * n * (4 if settings.optimizer.endswith("8bit") else settings.dtype.of("states").itemsize)
