"""Weight quantization formats: a page each, one equation, one contract.

    f = formats.get("nf4", block=64, dq=True)
    q = f.quantize(w)
    q.dequantize(torch.bfloat16), q.nbytes, q.bits_per_parameter

A name stands for a `Format` class together with its options. Every module of this package is imported, and so is every
entry point of the group "qbench.formats" of an installed package; each registers its own names.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from .format import Codebook, Format, QuantizedTensor

__all__ = ["Codebook", "Format", "QuantizedTensor", "get", "names", "register"]

_registry: dict[str, Callable[..., Format]] = {}


def register(*names: str, **options):
    """Decorate a `Format` class: each of `names` gets it with these options. Raises ValueError if a name is taken."""

    def add(cls: type[Format]) -> type[Format]:
        for name in names:
            if name in _registry:
                raise ValueError(f"format name {name!r} is taken")
            _registry[name] = lambda **given: cls(**{**options, **given})
        return cls

    return add


def get(name: str, block: int = 64, dq: bool = False, **options) -> Format:
    """The format `name`, with a block size, with or without double quantization, and options of its own.

    Raises KeyError, listing the names, if there is none such; ValueError or TypeError for a bad argument.
    """
    _discover()
    if name not in _registry:
        raise KeyError(f"unknown format {name!r}; there are: {', '.join(names())}")
    return _registry[name](block=block, dq=dq, **options)


def names() -> list[str]:
    """Every registered name, sorted."""
    _discover()
    return sorted(_registry)


@lru_cache
def _discover() -> None:
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="qbench.formats"):
        if entry.name not in _registry:
            found = entry.load()
            if entry.name not in _registry:  # a class that did not register itself
                register(entry.name)(found)
