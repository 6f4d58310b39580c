"""What a training step has to hold in memory, in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from cm_diffusers.training.sharding import own_part


@dataclass
class Footprint:
    """Bytes of one process, of everything that lives through a step or its backward pass.

    Args:
        student, teacher, averages (`int`): weights and buffers of the student, the teacher, and of target and
            evaluation average together. What a student of adapters shares with its teacher counts once, there.
        encoders (`int`): of text and of pictures, where there are any.
        gradients (`int`): of the student.
        optimizer (`int`): its moments.
        activations (`int`): what one micro-step keeps for its backward pass.
    """

    student: int
    teacher: int
    averages: int
    encoders: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


class Kept:
    """Counts the memory that autograd keeps for the backward pass, each piece once, without the weights."""

    def __init__(self, *networks: nn.Module) -> None:
        weights = (weight for network in networks for weight in network.parameters())
        self.bytes = 0
        self._seen = {_identity(own_part(weight).untyped_storage()) for weight in weights}
        self._alive: list[Any] = []

    @contextmanager
    def counting(self) -> Iterator[Kept]:
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield self
        self._alive.clear()

    @contextmanager
    def by_block(self, network: nn.Module) -> Iterator[dict[nn.Module, int]]:
        """Also count what is kept for each block that gradient checkpointing would compute again."""
        found: dict[nn.Module, int] = {}
        blocks = {
            block
            for owner in network.modules()
            if hasattr(owner, "gradient_checkpointing")
            for part in owner.children()
            if isinstance(part, nn.ModuleList)
            for block in part
            if not hasattr(block, "gradient_checkpointing")
        }

        def before(block: nn.Module, *_: Any) -> None:
            found[block] = -self.bytes

        def after(block: nn.Module, *_: Any) -> None:
            found[block] += self.bytes

        hooks = [
            hook for b in blocks for hook in (b.register_forward_pre_hook(before), b.register_forward_hook(after))
        ]
        yield found
        for hook in hooks:
            hook.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = own_part(tensor).untyped_storage()
        if _identity(storage) not in self._seen:
            self._seen.add(_identity(storage))
            self._alive.append(storage)  # no other may take its identity
            self.bytes += storage.nbytes()
        return tensor.detach()  # an operation that kept its own output would keep itself alive, for ever


def _identity(storage: torch.UntypedStorage) -> int:
    """Of the storage, not of its memory: FSDP2 frees that of gathered weights, and others then take the address."""
    return storage._cdata


def bytes_of(*networks: nn.Module | None, beside: nn.Module | None = None) -> int:
    """Weights and buffers, of which this process holds a part if they are sharded; none that is `beside`'s, too."""
    counted = {id(weight) for weight in beside.parameters()} if beside is not None else set()
    return sum(
        own_part(tensor).nbytes
        for network in networks
        if network is not None
        for tensor in [*network.parameters(), *network.buffers()]
        if id(tensor) not in counted
    )


def bytes_of_gradients(network: nn.Module) -> int:
    return sum(own_part(parameter).nbytes for parameter in network.parameters() if parameter.requires_grad)


def gathered_at_once(network: nn.Module) -> int:
    """Bytes of a network in parts that are put together at the same time.

    With FSDP2 its own layers and those of one block; with ZeRO-3 all of it, which is what DeepSpeed keeps of networks
    below a billion weights.
    """
    blocks = [module for module in network.modules() if isinstance(module, FSDPModule) and module is not network]
    in_blocks = [sum(weight.nbytes for weight in block.parameters()) for block in blocks]
    whole = sum(getattr(weight, "ds_numel", weight.numel()) * weight.element_size() for weight in network.parameters())
    return int(whole - sum(in_blocks) + max(in_blocks, default=0))
