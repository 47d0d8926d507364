"""The plug-in through which transformers loads, quantizes and saves packed models.

    AutoModelForCausalLM.from_pretrained(path, quantization_config=QBenchConfig("nf4", block=64, dq=True))

quantizes a 16-bit checkpoint, each weight as it is read. As in a run, these are the weights of all linear layers outside
of the head. `save_pretrained` then writes a packed checkpoint. `from_pretrained` loads it: packed weights go straight into
their layers and are never in 16 bit.

transformers is half imported when this module is imported. So functions here import models where they need them.
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
    """The `quantization_config` of `from_pretrained` and of config.json: it holds a `Recipe`.

    format, block, dq and options: arguments of `formats.get`. Raises InputError if there is no such format.
    """

    quant_method = METHOD  # type: ignore[assignment]  # an enum of transformers; registered names are accepted, too

    def __init__(self, format: str, block: int = 64, dq: bool = False, **options: Any) -> None:
        self.recipe = Recipe.of({"name": format, "block": block, "dq": dq, **options}, {})

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config for the content of config.json. Raises InputError if it is no valid recipe."""
        config = cls.from_recipe(Recipe.from_json(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "QBenchConfig":
        """The config that holds this recipe."""
        config = cls(recipe.arguments["name"])
        config.recipe = recipe
        return config

    def to_dict(self) -> dict:
        return self.recipe.to_json()

    to_diff_dict = to_dict


@register_quantizer(METHOD)
class QBenchQuantizer(HfQuantizer):
    """Packs the layers of a model while transformers loads it, or fills in those of a packed checkpoint.

    transformers calls these methods. They raise InputError, naming the tensor, if a checkpoint, packed or not, does not
    match its config.
    """

    is_trainable = True  # through adapters
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
        from qbench.model.replacement import disable_weight_edits
        from qbench.model.selection import warn_of_layers_left

        from . import empty_model, tensor_names

        if not checkpoint_files:
            raise InputError("a state_dict is not accepted; a checkpoint in safetensors is")
        files = [Path(file) for file in checkpoint_files]
        self.where = files[-1].parent
        for file in files:
            if file.parent != self.where:
                raise InputError(f"{self.where}: {file} is in another folder; files of the same are accepted")
        contents = safetensors_io.read_headers(files)
        if self.pre_quantized:
            empty_model.place_empty_layers(model, self.recipe.layers(model))
        _, specs = tensor_names.match_names(model, contents)
        empty_model.check_tensors(model, specs, self.where)
        self.waiting: set[str] = set()
        if not self.pre_quantized:
            self.waiting = set(empty_model.layers_to_quantize(model, self.where, specs))
            disable_weight_edits(model)
            warn_of_layers_left(model)
        self.refused: InputError | None = None

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **kwargs: Any) -> bool:
        return param_name.removesuffix(".weight") in self.waiting and param_name.endswith(".weight")

    def param_element_size(self, model: "PreTrainedModel", param_name: str, param: Tensor) -> float:
        """Bytes per element, for `device_map="auto"`."""
        if self.param_needs_quantization(model, param_name):
            return self.recipe.format.count_bytes(param.numel()) / param.numel()
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> "QBenchQuantizer":
        return self

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantize a weight that has been read, and put it into its layer.

        An error is kept in `refused` and raised after loading: transformers would replace it with one of its own.
        """
        from qbench.model.replacement import replace_layers
        from qbench.model.selection import weight_of

        ((name, weight),) = input_dict.items()
        layer = name.removesuffix(".weight")
        weight = weight_of(model.get_submodule(layer), weight[0] if isinstance(weight, list) else weight)
        try:
            if not self.refused:
                replace_layers(model, {layer: self.recipe.format.quantize(weight, name=f"{self.where}: {name}")})
                missing_keys.discard(name)
        except ValueError as error:
            self.refused = InputError(str(error))
        return {}

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from qbench.model.selection import count_coverage, packed_layers

        from . import empty_model

        if self.refused:
            raise self.refused
        for name, tensor in model.state_dict().items():
            if not tensor.is_meta and not empty_model.is_finite(tensor):
                raise InputError(f"{self.where}: {name} holds NaN or Inf; finite values are accepted")
        layers = packed_layers(model)
        on_disk = "disk" in getattr(model, "hf_device_map", {}).values()
        for name, layer in layers.items():
            if layer.codes.is_meta and on_disk and not self.pre_quantized:
                raise InputError(
                    f"{name} would be offloaded to disk, where only its 16-bit weight is; accepted: a device_map without "
                    "disk, or a packed checkpoint, which `python -m qbench quantize` writes"
                )
            if layer.codes.is_meta and on_disk:
                empty_model.check_offloaded(model, name, layer)
            empty_model.complete_layer(f"{self.where}: {name}", layer, self.recipe.format)
        if not self.pre_quantized:
            dtypes = {name: layer.dtype for name, layer in layers.items()}
            self.quantization_config.recipe = Recipe.of(self.recipe.arguments, dtypes, coverage=count_coverage(model))
        return model

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Tensor] | None, dict]:
        """The tensors to be saved. Raises InputError if they could not be loaded again."""
        from . import empty_model

        if getattr(model, "_hf_peft_config_loaded", False):  # then only the adapters are saved
            return None, {}
        return empty_model.tensors_to_save(model, self.recipe), {}

    def _dequantize(self, model: "PreTrainedModel", dtype: Any = None) -> "PreTrainedModel":
        from qbench.model.replacement import unpack_model

        unpack_model(model, dtype)
        return model


def attach_recipe(model: "PreTrainedModel", recipe: Recipe) -> None:
    """Make `save_pretrained` write a model as the recipe says, as if it had been loaded with it."""
    config = QBenchConfig.from_recipe(recipe)
    model.config.quantization_config = config
    vars(model)["hf_quantizer"] = QBenchQuantizer(config, pre_quantized=True)
