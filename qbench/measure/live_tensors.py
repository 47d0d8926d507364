"""Counts the bytes of live tensors, operation by operation.

A process's resident set includes memory that libraries cache, and a CPU's allocator records no peak. This count is exact
to the byte on any device. It also works on `meta`, where tensors have a size but no memory.
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

DECODED = "decoded"  #: the kind of a weight that was decoded for a product


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of all storages that operations create, until they are freed.

    A storage counts once, however many tensors view it. Not counted: temporaries inside a C++ operation, and tensors that
    were created outside.

    peak: the most bytes alive at once. peaks: for each value that the program gives to `label`, the largest total while
    it was set, as bytes by kind. The kind of a storage is the value of `kind` when it was created; `tag` changes it.

    kernels: the module of `qbench.ops` whose `linear` and `linear_dx` replace the fused ops. They run operation by
    operation, so that the decoded weight is counted while it lives.
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
        """Give the storage of a tensor another kind, and if `nbytes` is given, another size."""
        storage = tensor.untyped_storage()
        self._forget(storage._cdata)
        self._count(storage, kind, storage.nbytes() if nbytes is None else nbytes)

    def run_operation(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Run an operation that `kernels` does not replace."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _find_tensors((args, kwargs)):  # unknown ones were created outside
            if tensor.untyped_storage()._cdata not in self._storages:
                self._count(tensor.untyped_storage(), self.kind, 0)
        if func in self._kernels:
            with self:
                result = self._kernels[func](*args, **kwargs)
        else:
            result = self.run_operation(func, args, kwargs)
        kind = DECODED if func is torch.ops.qbench.dequantize.default else self.kind
        for tensor in _find_tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._count(storage, kind, storage.nbytes())
        before = self.peaks.get(self.label)
        if before is None or sum(self.live.values()) > sum(before.values()):
            self.peaks[self.label] = dict(self.live)
        return result

    def _count(self, storage: torch.UntypedStorage, kind: str, nbytes: int) -> None:
        key = storage._cdata
        reference = weakref.ref(storage, lambda _: self._forget(key))
        self._storages[key] = reference, kind, nbytes
        self.live[kind] = self.live.get(kind, 0) + nbytes

    def _forget(self, key: int) -> None:
        _, kind, nbytes = self._storages.pop(key, (None, self.kind, 0))
        self.live[kind] = self.live.get(kind, 0) - nbytes


def _find_tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
