"""Tensors of which each rank holds a part (torch's DTensor), and those which each rank holds whole, told alike."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_shard(x: Any) -> bool:
    """Whether other ranks hold the rest of a tensor."""
    return isinstance(x, Tensor) and hasattr(x, "full_tensor")


def in_rows(x: Any) -> bool:
    """Whether a tensor is divided along its first axis, as torch's ``fully_shard`` divides."""
    if not is_shard(x):
        return False
    from torch.distributed.tensor import Shard

    return tuple(x.placements) == (Shard(0),)


def here(x: Any) -> Any:
    """The part that this rank holds, in the same memory and without a graph; what is whole itself."""
    return x.detach().to_local() if is_shard(x) else x


def whole(x: Any) -> Any:
    """All of it, on every rank; a collective for what is in parts."""
    return x.detach().full_tensor() if is_shard(x) else x


def on_first(tree: Any, rank: int) -> Any:
    """A tree of dictionaries and lists with its shards whole, on the CPU of rank 0; on the others they are empty.

    A collective. What is one tensor in several places stays so.
    """
    known: dict[int, Tensor] = {}

    def gathered(x: Any) -> Any:
        if type(x) in (dict, OrderedDict, defaultdict):
            return {name: gathered(value) for name, value in x.items()}
        if type(x) in (list, tuple):
            return type(x)(map(gathered, x))
        if not is_shard(x):
            return x.detach() if isinstance(x, Tensor) else x
        if id(x) not in known:
            full = whole(x)  # on every rank, one at a time
            known[id(x)] = full.cpu() if rank == 0 else full.new_empty(0)
        return known[id(x)]

    return gathered(tree)


def in_parts(x: Tensor, like: Any) -> Any:
    """A whole tensor, the same on all ranks, in parts as another one of its shape is, without a collective."""
    if not is_shard(like) or is_shard(x) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    x = x.to(like.device_mesh.device_type)
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def fill(x: Tensor, source: Tensor) -> None:
    """Write a whole tensor, the same on all ranks, into one that may be in parts."""
    x.copy_(in_parts(source, x))


def moments_in_parts(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state of whole moments, each in parts as its parameter is."""
    places = [place for group in state["param_groups"] for place in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    like = dict(zip(places, parameters, strict=True))
    divided = {place: _divided(held, like.get(place)) for place, held in state["state"].items()}
    return {**state, "state": divided}


def _divided(tree: Any, like: Any) -> Any:
    if type(tree) in (list, tuple):
        return type(tree)(_divided(x, like) for x in tree)
    if type(tree) is dict:
        return {name: _divided(x, like) for name, x in tree.items()}
    return in_parts(tree, like) if isinstance(tree, Tensor) else tree
