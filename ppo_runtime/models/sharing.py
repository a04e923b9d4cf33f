"""Which way ranks share a policy and its reference, as the configuration has it, and what becomes of an optimiser."""

from __future__ import annotations

from typing import Any

import torch

from ppo_runtime.config import PPOConfig
from ppo_runtime.models.packing import keeps_rows_apart
from ppo_runtime.models.units import layers_of
from ppo_runtime.ranks.parallel import Alone, Replicated
from ppo_runtime.ranks.sharded import Sharded
from ppo_runtime.ranks.shards import is_shard
from ppo_runtime.ranks.world import World

_NOT_IN_PARTS = (torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.Rprop)


def check_dividing(
    model: torch.nn.Module, ref_model: Any | None, optimizer: torch.optim.Optimizer | None, *, divided: bool
) -> None:
    """Refuse a model that ranks have divided before, and an optimiser of one that shall be divided now."""
    for name, one in (("model", model), ("ref_model", ref_model)):
        if isinstance(one, torch.nn.Module) and any(map(is_shard, one.parameters())):
            raise ValueError(
                f"{name} has been divided among the ranks already, by a trainer with parallelism='fsdp2', and can "
                "serve no other one; go on with that trainer, or load the model anew"
            )
    if divided and isinstance(getattr(optimizer, "optimizer", optimizer), _NOT_IN_PARTS):
        kinds = ", ".join(kind.__name__ for kind in _NOT_IN_PARTS)
        raise ValueError(
            f"optimizer is of a kind ({kinds}) that can't step on parts of parameters, and parallelism is 'fsdp2', "
            "which divides them; pass another kind, such as torch.optim.AdamW, or set parallelism='ddp'"
        )
    if divided and optimizer is not None and optimizer.state:
        raise ValueError(
            "optimizer has stepped already, and parallelism is 'fsdp2', which divides the parameters that its moments "
            "belong to; pass a new one, and load_checkpoint for its state"
        )


def share(model: torch.nn.Module, ref_model: Any | None, config: PPOConfig, world: World) -> Alone:
    """How ranks share a policy and its reference in their updates; dividing them changes both in place."""
    if not divides(config, world):
        return Alone(model, world) if world.size == 1 else Replicated(model, world)
    keeps_rows_apart(model)  # tried while it is whole: by then one rank may want to know, and another not
    others = [] if ref_model is None else [(ref_model, layers_of(ref_model))]
    return Sharded(model, world, layers_of(model), others)


def divides(config: PPOConfig, world: World) -> bool:
    """Whether each rank will hold but a part of the models."""
    return config.parallelism == "fsdp2" and world.size > 1


def with_parameters_of(
    optimizer: torch.optim.Optimizer, before: dict[str, torch.nn.Parameter], model: torch.nn.Module
) -> torch.optim.Optimizer:
    """An optimiser of one's own, over what has become of its parameters where the model has been divided."""
    now = {id(before[name]): parameter for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [now.get(id(one), one) for one in group["params"]]
    return optimizer
