"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) on states that are paged, in 8 bits, both or neither."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qbench.keys import SMALLEST_PAGE, check_paging

from .paging import PAGE, Pager, Paging, Piece
from .states import MIN_8BIT, Dynamic8, Plain, States
from .streams import lanes_of


def update(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: float, group: dict) -> None:
    """One step of AdamW, in place, on tensors of one shape and dtype; step: counts from 1.

    The operations are those of torch.optim.AdamW(foreach=False), in its order, hence its bits.
    """
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    if group["weight_decay"]:
        p.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    p.addcdiv_(exp_avg, root, value=-(lr / (1 - beta1**step)))


@dataclass
class Place:
    """How the states of a parameter are stored, and where."""

    states: States
    pager: Pager
    pieces: list[Piece]


class PagedAdamW(Optimizer):
    """AdamW whose moments take at most `budget` bytes of each device; the other pages are in host memory (`paging`).

    bits: 32, the moments in the parameter's dtype, as torch.optim.AdamW has them, with its results to the last bit
    (foreach=False, which is the default on a CPU); or 8, block-wise (`states`), computed in fp32. budget, page: bytes, an
    integer or text such as "64MB"; a budget of None has no end, and then nothing moves. Whatever the budget, the results
    are the same to the last bit. The step counts are on the host, as PyTorch's are. Beside the budget, a step needs room
    for the piece that it is at, no more than a page of elements: the root of a moment, and with 8 bits both in fp32.

    A state_dict is one of torch.optim.AdamW, with whole tensors on the CPU, and either loads the other's; 8-bit states
    are told in fp32, with the absmax of their blocks, so that they come back as they were.

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
        self._forget()

    def _forget(self) -> None:
        self.paging = Paging()  #: what the states take, and what moved
        self._pagers: dict[torch.device, Pager] = {}
        self._places: dict[Tensor, Place] = {}
        self.state.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient. On a GPU it returns before the work is done.

        Raises ValueError for a complex parameter or a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.is_complex() or p.grad.is_sparse for p, _ in active):
            raise ValueError("a complex parameter or a sparse gradient is not accepted; dense real ones are")
        self._place([p for p, _ in active])
        work: dict[Pager, dict[int, list[tuple]]] = {pager: {} for pager in self._pagers.values()}
        copies = []
        for p, group in active:
            self.state[p]["step"] += 1
            place, flat = self._places[p], _flat(p)
            told = place.states, flat, _flat(p.grad, like=p), self.state[p]["step"].item(), group
            for piece in place.pieces:
                work[place.pager].setdefault(piece.page, []).append((piece, *told))
            if flat.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():
                copies.append((p, flat))
        for pager, pages in work.items():
            for page, memory in pager.visit(pages):
                for task in pages[page]:
                    _update_piece(memory, *task)
        for p, flat in copies:
            _put(p, flat, like=p)
        return loss

    def _place(self, parameters: list[Tensor]) -> None:
        """Make states, of zeros, for those of the parameters that have none."""
        new: dict[torch.device, list[tuple[Tensor, States]]] = {}
        for p in parameters:
            if p not in self._places:
                new.setdefault(p.device, []).append((p, self._states(p)))
        for device, pairs in new.items():
            if device not in self._pagers:
                all_here = (p for group in self.param_groups for p in group["params"] if p.device == device)
                total = sum(self._states(p).nbytes(p.numel()) for p in all_here)
                page = min(self._page, max(total, SMALLEST_PAGE))  # a small model does not fill one
                self._pagers[device] = Pager(lanes_of(device), page, self._budget, self.paging)
            pager = self._pagers[device]
            placed = pager.place([(states, p.numel()) for p, states in pairs])
            for (p, states), pieces in zip(pairs, placed, strict=True):
                self._places[p] = Place(states, pager, pieces)
                self.state[p]["step"] = _step(0)

    def _states(self, p: Tensor) -> States:
        if self._bits == 32:
            return Plain(p.dtype)
        wide = torch.promote_types(p.dtype, torch.float32)
        return Dynamic8(wide) if p.numel() >= MIN_8BIT else Plain(wide)

    def state_dict(self) -> dict:
        """As torch.optim.AdamW's, the tensors on the CPU."""
        kept = self.state
        try:
            self.state = defaultdict(dict, {p: self._told(p) for p in kept})
            return super().state_dict()
        finally:
            self.state = kept

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over groups and states, of this class or torch.optim.AdamW; `paging` counts from zero again.

        Raises ValueError where the groups are others, or ask for what is not done here.
        """
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"{name}: true is not accepted")
        super().load_state_dict({**state_dict, "state": {}})
        self._forget()
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        told = {p: state_dict["state"][i] for i, p in zip(saved, own, strict=True) if i in state_dict["state"]}
        self._place(list(told))
        for p, entries in told.items():
            self.state[p]["step"] = _step(float(entries["step"]))
            self._retell(p, entries)

    def _told(self, p: Tensor) -> dict[str, Tensor]:
        place, parts = self._places[p], []
        for piece in place.pieces:
            end = piece.offset + place.states.nbytes(piece.stop - piece.start)
            memory = place.pager.read(piece.page, piece.offset, end)
            parts.append(place.states.told(place.states.views(memory, piece.stop - piece.start)))
        found = {
            name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else Plain.names) if parts
        }
        for name in Plain.names:
            whole = torch.empty_like(p, dtype=place.states.dtype, device="cpu", requires_grad=False)
            found[name] = _put(whole, found[name], like=p) if parts else whole
        return {"step": self.state[p]["step"].clone(), **found}

    def _retell(self, p: Tensor, entries: dict[str, Tensor]) -> None:
        place = self._places[p]
        told = {name: value.cpu() for name, value in entries.items() if name != "step"}
        told |= {name: _flat(told[name].view_as(p), like=p) for name in Plain.names}
        for piece in place.pieces:
            n = piece.stop - piece.start
            memory = torch.empty(place.states.nbytes(n), dtype=torch.uint8, device="cpu")
            place.states.retell(place.states.views(memory, n), told, piece.start, piece.stop)
            place.pager.write(piece.page, piece.offset, memory)


def _step(count: float) -> Tensor:
    return torch.tensor(count, dtype=torch.float32, device="cpu")


def _update_piece(
    memory: Tensor, piece: Piece, states: States, flat: Tensor, grad: Tensor, step: float, group: dict
) -> None:
    """Update elements start … stop − 1 of a flat parameter, whose states lie in `memory`, uint8, of their page."""
    elements = slice(piece.start, piece.stop)
    stored = states.views(memory[piece.offset :], piece.stop - piece.start)
    moments = states.moments(stored)
    p = flat[elements].to(states.dtype)  # no copy, where it is that dtype
    update(p, grad[elements].to(states.dtype), *moments, step, group)
    states.store(stored, *moments)
    flat[elements].copy_(p)


def _flat(t: Tensor, like: Tensor | None = None) -> Tensor:
    """The elements [n] of `t`, in the order in which those of `like`, or its own, lie in memory; a view if it can be."""
    return t.detach().permute(_order(t if like is None else like)).reshape(-1)


def _put(to: Tensor, flat: Tensor, like: Tensor) -> Tensor:
    """Undo `_flat`, into `to`."""
    permuted = to.detach().permute(_order(like))
    permuted.copy_(flat.view(permuted.shape))
    return to


def _order(t: Tensor) -> list[int]:
    strides = t.stride()
    return sorted(range(t.dim()), key=lambda dim: -strides[dim])
