"""What transformers asks when it loads a model that is packed, or is to be, and when it saves one.

    AutoModelForCausalLM.from_pretrained(path, quantization_config=QBenchConfig("nf4", block=64, dq=True))

quantizes a 16-bit checkpoint, each weight as it is read: those of a run, of every linear layer but those of its head.
`save_pretrained` then writes a packed checkpoint (`checkpoint`), and `from_pretrained` puts the packed weights of one
straight in their places, so that none of them is ever in 16 bit.

transformers is half imported when this module is, so its models are imported where they are used.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qbench.errors import InputError

from . import safetensors_io
from .recipe import METHOD, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(METHOD)
class QBenchConfig(QuantizationConfigMixin):
    """A format, as `from_pretrained` takes it for its `quantization_config`, and as config.json holds it: a `Recipe`.

    format, block, dq and options: what `formats.get` takes. Raises InputError where that does.
    """

    quant_method = METHOD  # type: ignore[assignment]  # an enum of transformers, open to names registered with it

    def __init__(self, format: str, block: int = 64, dq: bool = False, **options: Any) -> None:
        self.recipe = Recipe.of({"name": format, "block": block, "dq": dq, **options}, {})

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Raises InputError for what is no recipe."""
        config = cls.of(Recipe.read(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def of(cls, recipe: Recipe) -> "QBenchConfig":
        config = cls(recipe.arguments["name"])
        config.recipe = recipe
        return config

    def to_dict(self) -> dict:
        return self.recipe.plain()

    to_diff_dict = to_dict


@register_quantizer(METHOD)
class QBenchQuantizer(HfQuantizer):
    """Packs the layers of a model that is being loaded, and sees to it that nothing else happens to them.

    Raises InputError that names the tensor for a checkpoint, packed or not, that is not what its config says.
    """

    is_trainable = True  # adapters are
    is_compileable = True
    quantization_config: QBenchConfig

    def is_serializable(self) -> bool:
        return True

    @property
    def recipe(self) -> Recipe:
        return self.quantization_config.recipe

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from qbench.model.replacement import hold_still
        from qbench.model.selection import warn_of_left

        from . import empty_model, tensor_names

        if not checkpoint_files:
            raise InputError("a state_dict is not accepted; a checkpoint in safetensors is")
        files = [Path(file) for file in checkpoint_files]
        self.where = files[-1].parent
        for file in files:
            if file.parent != self.where:
                raise InputError(f"{self.where}: {file} is in another folder; files of the same are accepted")
        contents = safetensors_io.headers(files)
        if self.pre_quantized:
            empty_model.place(model, self.recipe.layers(model))
        _, found = tensor_names.named(model, contents)
        empty_model.match(model, found, self.where)
        self.waiting: set[str] = set() if self.pre_quantized else set(empty_model.layers_of(model, self.where, found))
        if not self.pre_quantized:
            hold_still(model)
            warn_of_left(model)
        self.refused: InputError | None = None

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **kwargs: Any) -> bool:
        return param_name.removesuffix(".weight") in self.waiting and param_name.endswith(".weight")

    def param_element_size(self, model: "PreTrainedModel", param_name: str, param: Tensor) -> float:
        """Bytes a weight, for `device_map="auto"`."""
        if self.param_needs_quantization(model, param_name):
            return self.recipe.format.count_bytes(param.numel()) / param.numel()
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> "QBenchQuantizer":
        return self

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Put a weight that has been read in its place, packed."""
        from qbench.model.replacement import replace
        from qbench.model.selection import weight_of

        ((name, weight),) = input_dict.items()
        layer = name.removesuffix(".weight")
        weight = weight_of(model.get_submodule(layer), weight[0] if isinstance(weight, list) else weight)
        try:
            if not self.refused:
                replace(model, {layer: self.recipe.format.quantize(weight, name=f"{self.where}: {name}")})
                missing_keys.discard(name)
        except ValueError as error:  # what is raised here, transformers logs, and raises something else
            self.refused = InputError(str(error))
        return {}

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from qbench.model.selection import coverage, packed_layers

        from . import empty_model

        if self.refused:
            raise self.refused
        for name, tensor in model.state_dict().items():
            if not tensor.is_meta and not empty_model.finite(tensor):
                raise InputError(f"{self.where}: {name} holds NaN or Inf; finite values are accepted")
        layers = packed_layers(model)
        on_disk = "disk" in getattr(model, "hf_device_map", {}).values()
        for name, layer in layers.items():
            if layer.codes.is_meta and on_disk and not self.pre_quantized:
                raise InputError(
                    f"{name} is to lie on disk, where there is its 16-bit weight alone; accepted: a device_map without "
                    "disk, or a packed checkpoint, which `python -m qbench.quantize` writes"
                )
            if layer.codes.is_meta and on_disk:
                empty_model.check_offloaded(model, name, layer)
            empty_model.settle(f"{self.where}: {name}", layer, self.recipe.format)
        if not self.pre_quantized:
            dtypes = {name: layer.dtype for name, layer in layers.items()}
            self.quantization_config.recipe = Recipe.of(self.recipe.arguments, dtypes, coverage=coverage(model))
        return model

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Tensor] | None, dict]:
        """What is saved. Raises InputError where it could not be read back."""
        from . import empty_model

        if getattr(model, "_hf_peft_config_loaded", False):  # the adapters alone are saved
            return None, {}
        return empty_model.checked(model, self.recipe), {}

    def _dequantize(self, model: "PreTrainedModel", dtype: Any = None) -> "PreTrainedModel":
        from qbench.model.replacement import unpack_all

        unpack_all(model, dtype)
        return model


def tell(model: "PreTrainedModel", recipe: Recipe) -> None:
    """Have the `save_pretrained` of a model write it as a recipe says, as if it had been loaded so."""
    config = QBenchConfig.of(recipe)
    model.config.quantization_config = config
    vars(model)["hf_quantizer"] = QBenchQuantizer(config, pre_quantized=True)
