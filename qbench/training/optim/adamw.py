"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) whose states are paged, in 8 bits, both or neither."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from qbench.keys import SMALLEST_PAGE, check_paging

from .paging import PAGE, Pager, PageSlice, PagingStats
from .states import MIN_8BIT, Moments, QuantizedMoments
from .streams import open_streams


def update(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: float, group: dict) -> None:
    """One step of AdamW, in place, on tensors of one shape and dtype. step: counts from 1.

    It runs the operations of torch.optim.AdamW(foreach=False) in the same order, so the results have the same bits.
    """
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    if group["weight_decay"]:
        p.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    p.addcdiv_(exp_avg, root, value=-(lr / (1 - beta1**step)))


@dataclass
class ParameterState:
    """How the moments of a parameter are stored, and in which slices of which pages."""

    moments: Moments
    pager: Pager
    slices: list[PageSlice]


class SliceUpdate(NamedTuple):
    """The update of one slice of a parameter. parameter, grad: [n], the whole parameter, flat. step: counts from 1."""

    page_slice: PageSlice
    moments: Moments
    parameter: Tensor
    grad: Tensor
    step: float
    group: dict

    def run(self, page: Tensor) -> None:
        """Update the slice's elements; its moments are in `page`, uint8."""
        elements = slice(self.page_slice.start, self.page_slice.stop)
        arrays = self.moments.arrays(page[self.page_slice.offset :], self.page_slice.stop - self.page_slice.start)
        moments = self.moments.load(arrays)
        p = self.parameter[elements].to(self.moments.dtype)  # no copy if it has that dtype
        update(p, self.grad[elements].to(self.moments.dtype), *moments, self.step, self.group)
        self.moments.store(arrays, *moments)
        self.parameter[elements].copy_(p)


class PagedAdamW(Optimizer):
    """AdamW whose moments take at most `budget` bytes of each device; the other pages are in host memory (`paging`).

    bits: 32 or 8. With 32 the moments have the parameter's dtype, as in torch.optim.AdamW, and the results are the same to
    the last bit (foreach=False, the default on a CPU). With 8 they are block-wise 8-bit (`states`), computed in fp32.
    budget, page: bytes, an integer or text such as "64MB". A budget of None is unlimited, and then nothing moves. The
    budget does not change the results, to the last bit.

    Step counts are on the host, as PyTorch's are. Beyond the budget, a step needs room for one slice, at most a page of
    elements: the root of a moment, and with 8 bits both moments in fp32.

    A state_dict has the form of torch.optim.AdamW's, with whole tensors on the CPU, and each class loads the other's. It
    holds 8-bit states as fp32, with the absmax of their blocks, so that loading restores them exactly.

    Raises InputError for a budget below one page.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
        budget: int | str | None = None,
        page: int | str = PAGE,
    ):
        numbers = {"lr": lr, "betas[0]": betas[0], "betas[1]": betas[1], "eps": eps, "weight_decay": weight_decay}
        for name, value in numbers.items():
            if not 0 <= value < (1 if "betas" in name else float("inf")):
                raise ValueError(f"{name}: {value} is not accepted")
        if bits not in (8, 32):
            raise ValueError(f"bits: {bits} is not accepted; 8 and 32 are")
        self._bits, (self._budget, self._page) = bits, check_paging(budget, page)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._reset()

    def _reset(self) -> None:
        self.paging = PagingStats()
        self._pagers: dict[torch.device, Pager] = {}
        self._states: dict[Tensor, ParameterState] = {}
        self.state.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient. On a GPU it returns before the work is done.

        A page holds the moments of several small parameters, or a slice of a large one. The pages are visited in turn:

            host, pinned                     device                  current stream
            page 5   ──── stream "in" ────▶  slot 0: page 5
                                             slot 1: page 2  ──────▶ update the slices whose moments are in page 2
            page 1   ◀─── stream "out" ───   slot 2: page 1

        Raises ValueError for a complex parameter or a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.is_complex() or p.grad.is_sparse for p, _ in active):
            raise ValueError("a complex parameter or a sparse gradient is not accepted; dense real ones are")
        self._create_states([p for p, _ in active])
        flat = {p: _flatten(p) for p, _ in active}
        for pager, pages in self._updates_by_page(active, flat).items():
            for page, memory in pager.visit(pages):
                for slice_update in pages[page]:
                    slice_update.run(memory)
        for p, elements in flat.items():
            if elements.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():  # it is a copy
                _unflatten(elements, p, like=p)
        return loss

    def _updates_by_page(
        self, active: list[tuple[Tensor, dict]], flat: dict[Tensor, Tensor]
    ) -> dict[Pager, dict[int, list[SliceUpdate]]]:
        """Count a step of each active parameter, and list the updates of its slices by pager and page."""
        updates: dict[Pager, dict[int, list[SliceUpdate]]] = {pager: {} for pager in self._pagers.values()}
        for p, group in active:
            self.state[p]["step"] += 1
            state, step = self._states[p], self.state[p]["step"].item()
            assert p.grad is not None, "active parameters have a gradient"
            grad = _flatten(p.grad, like=p)
            for page_slice in state.slices:
                slice_update = SliceUpdate(page_slice, state.moments, flat[p], grad, step, group)
                updates[state.pager].setdefault(page_slice.page, []).append(slice_update)
        return updates

    def _create_states(self, parameters: list[Tensor]) -> None:
        """Create states of zeros for the parameters that have none."""
        new: dict[torch.device, list[tuple[Tensor, Moments]]] = {}
        for p in parameters:
            if p not in self._states:
                new.setdefault(p.device, []).append((p, self._moments_for(p)))
        for device, pairs in new.items():
            if device not in self._pagers:
                on_device = (p for group in self.param_groups for p in group["params"] if p.device == device)
                total = sum(self._moments_for(p).nbytes(p.numel()) for p in on_device)
                page = min(self._page, max(total, SMALLEST_PAGE))  # a small model does not fill a page
                self._pagers[device] = Pager(open_streams(device), page, self._budget, self.paging)
            pager = self._pagers[device]
            slices_of_each = pager.allocate([(moments, p.numel()) for p, moments in pairs])
            for (p, moments), slices in zip(pairs, slices_of_each, strict=True):
                self._states[p] = ParameterState(moments, pager, slices)
                self.state[p]["step"] = _step_tensor(0)

    def _moments_for(self, p: Tensor) -> Moments:
        if self._bits == 32:
            return Moments(p.dtype)
        compute_dtype = torch.promote_types(p.dtype, torch.float32)
        return QuantizedMoments(compute_dtype) if p.numel() >= MIN_8BIT else Moments(compute_dtype)

    def state_dict(self) -> dict:
        """As torch.optim.AdamW's, with the tensors on the CPU."""
        counts = self.state
        try:
            self.state = defaultdict(dict, {p: self._export(p) for p in counts})
            return super().state_dict()
        finally:
            self.state = counts

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load groups and states of this class or torch.optim.AdamW; `paging` counts from zero again.

        Raises ValueError if the groups differ, or ask for amsgrad or maximize.
        """
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"{name}: true is not accepted")
        super().load_state_dict({**state_dict, "state": {}})
        self._reset()
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        states = state_dict["state"]
        entries_of = {p: states[i] for i, p in zip(saved, own, strict=True) if i in states}
        self._create_states(list(entries_of))
        for p, entries in entries_of.items():
            self.state[p]["step"] = _step_tensor(float(entries["step"]))
            self._import(p, entries)

    def _export(self, p: Tensor) -> dict[str, Tensor]:
        """The state_dict entries of a parameter: its step and its whole moments, on the CPU."""
        state, parts = self._states[p], []
        for page_slice in state.slices:
            n = page_slice.stop - page_slice.start
            memory = state.pager.read(page_slice.page, page_slice.offset, page_slice.offset + state.moments.nbytes(n))
            parts.append(state.moments.to_entries(state.moments.arrays(memory, n)))
        entries = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
        for name in Moments.names:
            whole = torch.empty_like(p, dtype=state.moments.dtype, device="cpu", requires_grad=False)
            entries[name] = _unflatten(entries[name], whole, like=p) if parts else whole
        return {"step": self.state[p]["step"].clone(), **entries}

    def _import(self, p: Tensor, entries: dict[str, Tensor]) -> None:
        """Write state_dict entries into the pages of a parameter, whose states are new."""
        state = self._states[p]
        flat = {name: value.cpu() for name, value in entries.items() if name != "step"}
        flat |= {name: _flatten(flat[name].view_as(p), like=p) for name in Moments.names}
        for page_slice in state.slices:
            n = page_slice.stop - page_slice.start
            memory = torch.empty(state.moments.nbytes(n), dtype=torch.uint8, device="cpu")
            state.moments.from_entries(state.moments.arrays(memory, n), flat, page_slice.start, page_slice.stop)
            state.pager.write(page_slice.page, page_slice.offset, memory)


def _step_tensor(count: float) -> Tensor:
    return torch.tensor(count, dtype=torch.float32, device="cpu")


def _flatten(t: Tensor, like: Tensor | None = None) -> Tensor:
    """The elements [n] of `t`, in the memory order of `like`, or of `t` itself. It is a view where possible."""
    return t.detach().permute(_memory_order(t if like is None else like)).reshape(-1)


def _unflatten(flat: Tensor, target: Tensor, like: Tensor) -> Tensor:
    """Undo `_flatten`, into `target`."""
    permuted = target.detach().permute(_memory_order(like))
    permuted.copy_(flat.view(permuted.shape))
    return target


def _memory_order(t: Tensor) -> list[int]:
    """The dimensions of `t`, from the largest stride to the smallest."""
    strides = t.stride()
    return sorted(range(t.dim()), key=lambda dim: -strides[dim])
