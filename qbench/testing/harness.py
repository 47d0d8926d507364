"""Properties of a format within qbench: in a layer, and in a checkpoint."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from formats import Format, QuantizedTensor
from formats.contract import expect
from formats.registry import lent
from qbench.checkpoint import auto_classes, location, packed_checkpoint
from qbench.model import quantizing
from qbench.model.quant_linear import QuantLinear
from qbench.model.replacement import replace_layers
from qbench.model.selection import linear_layers

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  #: largest relative error of a norm
CPU = torch.device("cpu")


def layered(fmt: Format, w: Tensor) -> None:
    """A layer in the format computes x·Wᵀ + b and the gradient of x, for any number of rows.

    Both are compared with float64 and the decoded weight.
    """
    generator = torch.Generator().manual_seed(0)
    layer = QuantLinear(fmt.quantize(w), torch.randn(len(w), generator=generator, dtype=torch.float32).to(w.dtype))
    expect(torch.equal(layer.weight, fmt.quantize(w).dequantize()), "a layer decodes to other weights", "the same")
    exact, most = layer.packed.dequantize(torch.float32).double(), TOLERANCE[w.dtype]
    for rows in ((0,), (1,), (2, 3), (100,)):
        x = torch.randn(*rows, w.shape[1], generator=generator).to(w.dtype).requires_grad_()
        g = torch.randn(*rows, w.shape[0], generator=generator).to(w.dtype)
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, g)
        for quantity, actual, exact_result in (
            ("product", y.detach(), x.detach().double() @ exact.t() + layer.bias.double()),
            ("gradient", dx, g.double() @ exact),
        ):
            expect(actual.dtype == w.dtype, f"the {quantity} of {w.dtype} is {actual.dtype}", w.dtype)
            error = float((actual.double() - exact_result).norm() / exact_result.norm().clamp(min=1e-30))
            expect(error < most, f"the {quantity} of {rows} rows is off by {error:.2g} of its norm", f"below {most:g}")


def saved(fmt: Format, w: Tensor) -> None:
    """A model in the format has the same bytes after saving and loading, and computes the same logits."""
    model = _tiny_model()
    replace_layers(model, quantizing.quantize(linear_layers(model), fmt))
    with TemporaryDirectory() as folder, lent(fmt):
        arguments = {"name": fmt.name, "block": fmt.block, "dq": fmt.dq}
        packed_checkpoint.save(model, Path(folder) / "model", auto_classes.load_tokenizer(location.BUNDLED), arguments)
        loaded = packed_checkpoint.load(Path(folder) / "model", CPU, torch.float32).model
    after = _packed(loaded)
    for name, q in _packed(model).items():
        stored = after[name].stored
        expect(len(stored) == len(q.stored), f"{name} has {len(stored)} tensors", len(q.stored))
        same = all(torch.equal(a, b) for a, b in zip(q.stored, stored, strict=True))
        expect(same, f"what {name} stores is loaded as other bytes", "the same")
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        same = torch.equal(model(tokens).logits, loaded(tokens).logits)
    expect(same, "the loaded model computes something else", "the same")


def _packed(model: nn.Module) -> dict[str, QuantizedTensor]:
    return {name: layer.packed for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


def _tiny_model() -> PreTrainedModel:
    """Make a Llama of one layer, whose rows are not whole blocks."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)
