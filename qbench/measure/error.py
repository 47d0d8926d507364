"""The quantization error of the weights, and of the layers' outputs on real activations."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from formats import QuantizedTensor
from qbench.model.selection import weight_of


@dataclass
class Sums:
    """Float64 sums from which every error is computed. Sums of several layers can be added."""

    n: int = 0
    signal: float = 0.0  #: Σ w²
    noise: float = 0.0  #: Σ (w − ŵ)²
    max_abs: float = 0.0
    output: float = 0.0  #: Σ y²
    output_noise: float = 0.0  #: Σ (y − ŷ)²

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.n + other.n,
            self.signal + other.signal,
            self.noise + other.noise,
            max(self.max_abs, other.max_abs),
            self.output + other.output,
            self.output_noise + other.output_noise,
        )

    def metrics(self) -> dict:
        """The metrics of `weight_metrics`, and output_relative: the relative error of the layers' outputs."""
        return {
            **self.weight_metrics(),
            "output_relative": (self.output_noise / self.output) ** 0.5 if self.output else 0.0,
        }

    def weight_metrics(self) -> dict:
        """The errors of the weights: sqnr_db, mse, relative, max_abs.

        sqnr_db = 10·log10(Σw² / Σ(w−ŵ)²), None if there is no error. relative: of Frobenius norms.
        """
        return {
            "sqnr_db": 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else None,
            "mse": self.noise / self.n,
            "relative": (self.noise / self.signal) ** 0.5 if self.signal else 0.0,
            "max_abs": self.max_abs,
        }


def compare_weights(w: Tensor, other: Tensor) -> Sums:
    """Compare weights with their approximation, of the same shape, in fp32 with sums in fp64. Output sums stay 0."""
    difference = w.float() - other.float()
    return Sums(w.numel(), _sum_of_squares(w.float()), _sum_of_squares(difference), float(difference.abs().max()))


def _compare_layer(w: Tensor, packed: QuantizedTensor, x: Tensor) -> Sums:
    """Compare w [out, in] with its packed form, on inputs x [..., in], in fp32 with sums in fp64."""
    w, other = w.float(), packed.dequantize(torch.float32)
    x = x.reshape(-1, x.shape[-1]).float()
    sums = compare_weights(w, other)
    sums.output, sums.output_noise = _sum_of_squares(x @ w.t()), _sum_of_squares(x @ (w - other).t())
    return sums


def _sum_of_squares(t: Tensor) -> float:
    return float(t.double().square().sum())


@torch.inference_mode()
def layer_errors(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    packed: dict[str, QuantizedTensor],
    windows: Tensor,
    advance: Callable[[], None] = lambda: None,
) -> dict:
    """Errors of the model and of each layer, from one forward of the unquantized model on windows [n, seq].

    A hook compares each layer when it receives its input, so no activations are kept.
    """
    sums: dict[str, Sums] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            sums[name] = _compare_layer(weight_of(layer), packed[name], inputs[0])
            advance()

        return hook

    hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        model(input_ids=windows.to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        if name not in sums:  # an expert that got no token of these windows
            w = weight_of(layer)
            sums[name] = _compare_layer(w, packed[name], w.new_zeros(1, w.shape[1]))
    rows = [{"name": name, "shape": list(packed[name].shape), **sums[name].metrics()} for name in layers]
    return {**sum(sums.values(), Sums()).metrics(), "layers": rows}
