"""One of the two processes of test_parallel: `python -m tests.qbench.training.two_processes RANK MODEL OUT`."""

import copy
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import qbench
from qbench.model.selection import packed_layers

STEPS, CONFIG = 5, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def make(path: str, seed: int = 0) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(seed)
    for p in model.parameters():  # the second process starts from other values, which those of the first must replace
        p.data += seed * torch.randn_like(p)
    qbench.pack(model, "nf4", block=32, dq=True)
    return get_peft_model(model, CONFIG).train()


def train(model: nn.Module, tokens: torch.Tensor, sent: dict[str, int] | None = None) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        if sent and step == 1:
            sent.update(dict.fromkeys(sent, 0))  # do not count the set-up in the first step
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mean(losses: list[float]) -> list[float]:
    total = torch.tensor(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def sharded(model: PeftModel) -> PeftModel:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def by_pytorch(model: PeftModel, state: dict) -> None:
    model.to_empty(device="cpu")
    set_model_state_dict(
        model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    )


def by_accelerate(model: PeftModel, state: dict) -> None:
    fsdp2_load_full_state_dict(Accelerator(cpu=True), model, state)


def counted(sent: dict[str, int], name: str) -> None:
    """Count the bytes that a collective of torch.distributed sends."""
    collective = getattr(dist, name)

    def counting(*arguments, **options):
        given = [t for a in (*arguments, *options.values()) for t in (a if isinstance(a, list) else [a])]
        sizes = [t.nbytes for t in given if isinstance(t, torch.Tensor)]
        sent[name] += sum(sizes) if name == BROADCAST else max(sizes)  # for a gather, the whole result
        return collective(*arguments, **options)

    setattr(dist, name, counting)


BROADCAST = "_broadcast_coalesced"
# by release of PyTorch
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
COLLECTIVES = (BROADCAST, GATHER)


def main(rank: int, path: str, out: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    os.environ |= own  # accelerate needs them
    dist.init_process_group("gloo", f"file://{out}.meeting", rank=rank, world_size=2)
    tokens = torch.randint(0, 4096, (4, 24), generator=torch.Generator().manual_seed(0))
    mine, measured = tokens[2 * rank : 2 * rank + 2], {}
    sent = dict.fromkeys(COLLECTIVES, 0)
    for name in COLLECTIVES:
        counted(sent, name)
    packed = make(path)
    blocks = packed.base_model.model.model.layers
    measured["block_bytes"] = sum(p.nbytes for p in blocks.parameters())
    measured["weight_bytes"] = sum(2 * layer.num_weights for layer in packed_layers(blocks).values())
    measured["bytes"] = sum(p.nbytes for p in packed.parameters())
    measured["buffer_bytes"] = sum(b.nbytes for b in packed.buffers())
    measured["trained_bytes"] = sum(p.nbytes for p in packed.parameters() if p.requires_grad)
    measured["together"] = train(copy.deepcopy(packed), tokens)

    model = make(path, seed=rank)
    wrapped = DistributedDataParallel(model)
    measured["same_after_ddp"] = all(
        torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), packed.parameters(), strict=True)
    )
    gradients = {"sent": 0}

    def hook(state, bucket):
        state["sent"] += bucket.buffer().nbytes
        return (
            dist.distributed_c10d._get_default_group()
            .allreduce([bucket.buffer() / 2])
            .get_future()
            .then(lambda future: future.value()[0])
        )

    wrapped.register_comm_hook(gradients, hook)
    measured["ddp"] = mean(train(wrapped, mine, sent))
    measured["ddp_gradient_bytes"] = gradients["sent"] / STEPS
    measured["ddp_other_bytes"] = sent[BROADCAST] / (STEPS - 1)

    model = sharded(copy.deepcopy(packed))
    measured["local_bytes"] = sum(p.to_local().nbytes for p in model.parameters())
    measured["fsdp"] = mean(train(model, mine, sent))
    measured["fsdp_gathered_bytes"] = sent[GATHER] / (STEPS - 1)

    model = fully_shard(copy.deepcopy(packed), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    layer = next(iter(packed_layers(model).values()))
    layer.register_forward_hook(
        lambda layer, inputs, y: measured.update(mixed_dtypes=[str(p.dtype) for p in (*layer.packed_parameters(), y)])
    )
    measured["mixed"] = mean(train(model, mine))
    for name, fill in (("pytorch", by_pytorch), ("accelerate", by_accelerate)):  # the ways to load large models
        model, buffers = make(path), dict(packed.named_buffers())
        model = sharded(model.to("meta"))
        fill(model, packed.state_dict() if rank == 0 else {})
        for key, buffer in buffers.items():  # not in the state_dict, so sharding a model on meta has to restore them
            parent, _, leaf = key.rpartition(".")
            model.get_submodule(parent).register_buffer(leaf, buffer, persistent=False)
        measured[name] = mean(train(model, mine))
    if rank == 0:
        out.write_text(json.dumps(measured), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
