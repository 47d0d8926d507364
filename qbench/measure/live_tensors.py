"""The bytes of the tensors that are alive, counted operation by operation.

The resident set of a process holds what its libraries keep for later, and a CPU's allocator keeps no peak; this counts
what a program holds, to the byte, on any device, the `meta` device included, where a tensor has a size and no memory.
"""

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qbench import ops

DECODED = "decoded"  #: the kind of a weight that a product has decoded


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside make, each once however many tensors view it, until they are gone.

    peak: the most bytes alive at once. peaks: for each `label` that a program sets on its way, the most that was alive
    while it was set, by kind; a storage's kind is `kind` when it was made, and `tag` can change it. What an operation in
    C++ holds for itself does not show, and neither does what was made outside.

    kernels: the module of `qbench.ops` whose `linear` and `linear_dx` stand for the device; they run operation by
    operation, so that the weight they decode counts while it lasts.
    """

    def __init__(self, kernels: ModuleType = ops.cpu):
        super().__init__()
        self.kind, self.label = "", ""
        self.live: dict[str, int] = {}
        self.peaks: dict[str, dict[str, int]] = {}
        self._storages: dict[int, tuple[weakref.ref, str, int]] = {}
        self._kernels: dict[Any, Callable] = {
            torch.ops.qbench.linear.default: kernels.linear,
            torch.ops.qbench.linear_dx.default: kernels.linear_dx,
        }

    @property
    def peak(self) -> int:
        return max((sum(live.values()) for live in self.peaks.values()), default=0)

    def tag(self, tensor: Tensor, kind: str, nbytes: int | None = None) -> None:
        """Give the storage of a tensor another kind, and another size where it is to stand for one."""
        storage = tensor.untyped_storage()
        self._forget(storage._cdata)
        self._keep(storage, kind, storage.nbytes() if nbytes is None else nbytes)

    def answer(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The result of an operation that no kernel stands for."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):  # of which those unknown were made outside
            if tensor.untyped_storage()._cdata not in self._storages:
                self._keep(tensor.untyped_storage(), self.kind, 0)
        if func in self._kernels:
            with self:
                result = self._kernels[func](*args, **kwargs)
        else:
            result = self.answer(func, args, kwargs)
        kind = DECODED if func is torch.ops.qbench.dequantize.default else self.kind
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._keep(storage, kind, storage.nbytes())
        before = self.peaks.get(self.label)
        if before is None or sum(self.live.values()) > sum(before.values()):
            self.peaks[self.label] = dict(self.live)
        return result

    def _keep(self, storage: torch.UntypedStorage, kind: str, nbytes: int) -> None:
        key = storage._cdata
        reference = weakref.ref(storage, lambda _: self._forget(key))
        self._storages[key] = reference, kind, nbytes
        self.live[kind] = self.live.get(kind, 0) + nbytes

    def _forget(self, key: int) -> None:
        _, kind, nbytes = self._storages.pop(key, (None, self.kind, 0))
        self.live[kind] = self.live.get(kind, 0) - nbytes


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
