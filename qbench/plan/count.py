"""The memory of one training step: every line in bytes, at each moment of the step, and their sum.

Weights, scales, adapters and optimizer states are arithmetic: `Format.count_bytes` of each layer that a run quantizes, and
bytes per parameter for the rest. What a step allocates and frees is counted by running the step (`step.py`).

The peak is the largest sum over the moments, not the sum of the largest lines. The activations of the forward pass and the
gradients at the end of the backward pass are never alive together.
"""

from dataclasses import dataclass

from formats.packing import packed_bytes
from qbench import keys
from qbench.errors import InputError
from qbench.settings import FULL
from qbench.training.optim.states import BLOCK as STATE_BLOCK
from qbench.training.optim.states import MIN_8BIT

from . import step
from .settings import PlanSettings
from .shapes import Shape, Sizes

HELD = ("weights", "scales", "embeddings", "head", "norms", "others")  #: the lines of the model itself
#: the lines of a plan and their titles, in the order of a table
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
    """The memory of a step.

    moments: bytes of each line, by moment of the step. paged: bytes of optimizer states that may wait in host memory; no
    line includes them. trainable: number of trained parameters. linear: number of weights in linear layers. parameters:
    number of all parameters.
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
        """The moment that needs most memory."""
        return max(self.moments, key=self.total)

    @property
    def needed(self) -> int:
        return self.total(self.peak)

    @property
    def margin(self) -> int | None:
        """Bytes of the GPU that the step leaves free: negative if it does not fit, None without a GPU."""
        return None if self.settings.gpu is None else self.settings.gpu - self.needed

    @property
    def fits(self) -> bool:
        """Whether the step fits the GPU. True without a GPU."""
        return self.margin is None or self.margin >= 0

    @property
    def in_host(self) -> int:
        """Bytes of paged states in host memory at the peak: what exceeds the budget, or without a budget the GPU."""
        if self.settings.optimizer_budget is not None:
            return self.paged
        return 0 if self.margin is None else min(self.paged, max(0, self.paged - self.margin))

    @property
    def bits(self) -> float:
        """Bits per weight of the linear layers, with scales and tables."""
        line = self.moments[self.peak]
        return 8 * (line["weights"] + line["scales"]) / self.linear


def count_memory(shape: Shape, settings: PlanSettings) -> Plan:
    """The plan of a step. Raises InputError for settings that the model does not allow."""
    shape.check_seq(settings.seq)
    dtype, sizes = settings.dtype, shape.sizes
    trained = _trained_sizes(sizes, settings)
    held = _weight_bytes(sizes, settings) | {
        "embeddings": sum(sizes.embeddings) * dtype.of("embeddings").itemsize,
        "head": sum(sizes.head) * dtype.of("head").itemsize,
        "norms": sum(sizes.norms) * dtype.of("norms").itemsize + sizes.buffers,
        "others": sum(sizes.others) * dtype.of("compute").itemsize,
        "adapters": sum(trained) * dtype.of("adapters").itemsize if settings.low_rank else 0,
    }
    state_bytes = {n: _state_bytes(n, settings) for n in set(trained)}
    states = sum(state_bytes[n] for n in trained)
    held["states"] = _states_on_device(states, settings)
    moments = {}
    for moment, kinds in _largest_of_moments(step.peaks(shape, settings)).items():
        moments[moment] = _all_lines(settings, held | kinds)
    if settings.trains:
        trained_dtype = dtype.of("adapters" if settings.low_rank else "compute")
        gradient = dtype.of("gradients") if dtype.gradients else trained_dtype
        at_step = {"gradients": sum(trained) * gradient.itemsize, "copies": step.optimizer_copies(trained, settings)}
        moments[step.STEP] = _all_lines(settings, held | at_step)
    linear = sum(size.numel() for size in sizes.layers.values())
    return Plan(shape, settings, moments, states - held["states"], sum(trained), linear, sum(sizes.all))


def _largest_of_moments(peaks: step.Peaks) -> dict[str, dict[str, int]]:
    """For each moment, the bytes of each kind when most is alive."""
    moments = {}
    for moment, labels in step.MOMENTS.items():
        if present := [peaks[label] for label in labels if label in peaks]:
            moments[moment] = max(present, key=lambda kinds: sum(kinds.values()))
    return moments


def _all_lines(settings: PlanSettings, counted: dict[str, int]) -> dict[str, int]:
    """Every line of a moment: the counted ones, the others at 0, fragmentation and context."""
    lines = dict.fromkeys(LINES, 0) | counted
    lines["fragmentation"] = round(sum(lines.values()) * settings.fragmentation_percent / 100)
    lines["context"] = settings.context_bytes
    return lines


def _weight_bytes(sizes: Sizes, settings: PlanSettings) -> dict[str, int]:
    """Bytes of the codes, and of everything else that `Format.count_bytes` counts for each layer."""
    numels, fmt = [size.numel() for size in sizes.layers.values()], settings.format
    if settings.method == FULL:
        return {"weights": sum(numels) * settings.dtype.of("compute").itemsize, "scales": 0}
    total, codes = sum(map(fmt.count_bytes, numels)), sum(packed_bytes(n, fmt.bits) for n in numels)
    return {"weights": codes, "scales": total - codes}


def _trained_sizes(sizes: Sizes, settings: PlanSettings) -> list[int]:
    """Elements of each trained tensor. Raises InputError for a rank larger than a layer."""
    if settings.method == FULL:
        return sizes.all
    if not settings.trains:
        return []
    numels = []
    for name in step.adapted_layers(list(sizes.layers), settings.targets):
        out_features, in_features = sizes.layers[name]
        most = min(out_features, in_features)
        if most == 1:  # a gate, which gets no adapter
            continue
        if settings.rank > most:
            raise InputError(
                f"tune.rank: {settings.rank} is larger than {name}, {out_features} × {in_features}; accepted: 1 to {most}"
            )
        numels += [settings.rank * out_features, settings.rank * in_features]
        numels += [out_features] if settings.method == "dora" else []  # the magnitudes
    return numels


def _state_bytes(n: int, settings: PlanSettings) -> int:
    """Bytes of the states of a trained tensor of n elements: two moments of Adam; SGD has none, as it has no momentum."""
    if settings.optimizer == "sgd":
        return 0
    if not settings.optimizer.endswith("8bit"):
        return 2 * n * settings.dtype.of("states").itemsize
    return 2 * n * 4 if n < MIN_8BIT else 2 * (n + 4 * -(n // -STATE_BLOCK))


def _states_on_device(states: int, settings: PlanSettings) -> int:
    """Bytes of `states` that stay on the device: all, or with a paged optimizer the whole pages that fit its budget.

    Without a budget none are counted: the states take what the GPU has left.
    """
    if not settings.paged:
        return states
    budget, page = keys.check_paging(settings.optimizer_budget, settings.optimizer_page)
    return 0 if budget is None else min(states, budget // page * page)
