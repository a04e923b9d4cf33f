"""What must be the same on every rank, as plain facts by names: settings, models, data and what moves with steps."""

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from itertools import chain
from typing import Any

import torch
import transformers
from torch import nn

from ppo_runtime.common.redact import plain_settings
from ppo_runtime.common.transfers import on_cpu
from ppo_runtime.config import PPOConfig
from ppo_runtime.learning.optimisers import beside
from ppo_runtime.models.description import computed_by
from ppo_runtime.models.inner import transformers_model
from ppo_runtime.models.modes import recomputes, recomputes_within_backward
from ppo_runtime.models.value_head import HEAD_PREFIX
from ppo_runtime.ranks.gather import as_bytes
from ppo_runtime.ranks.shards import is_shard
from ppo_runtime.rollout.digest import prompt_digest

# What only the rank that writes reads, what says how long to wait, and labels.
_OWN_AFFAIR = frozenset(
    {"exp_name", "log_with", "tracker_kwargs", "project_kwargs", "tracker_project_name", "push_to_hub_if_best_kwargs"}
    | {"task_name", "model_name", "query_dataset", "reward_model", "accel_strict", "ranks_timeout"}
)
_FIRST = 8
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of so many bytes."""


def settings(config: PPOConfig) -> dict[str, Any]:
    """Those that have an influence on what is computed, and on where ranks meet."""
    found = {name: value for name, value in plain_settings(config).items() if name not in _OWN_AFFAIR}
    found["device"] = config.device.partition(":")[0]  # every rank has a GPU of its own
    # The arguments hold a token, which one rank alone may have.
    return found | {"the use of push_to_hub_if_best_kwargs": bool(config.push_to_hub_if_best_kwargs)}


def moving_parts(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, controller: Any, *functions: Callable[..., Any]
) -> dict[str, Any]:
    """What trains and in which group of the optimiser, its options, the KL coefficient, and what a step calls."""
    facts: dict[str, Any] = {
        "the class of optimizer": type(optimizer).__name__,
        "the class of lr_scheduler": type(scheduler).__name__,
        "the class of kl_ctl": type(controller).__name__,
        "the gradient checkpointing of model": _checkpointing(model),
        "the functions of a step": [getattr(one, "__qualname__", type(one).__name__) for one in functions],
    }
    groups = {id(one): number for number, group in enumerate(optimizer.param_groups) for one in group["params"]}
    for name, parameter in model.named_parameters():
        held = f", in optimizer group {groups[id(parameter)]}" if id(parameter) in groups else ""
        facts[f"{name} of model"] = f"{_described(parameter)}{held}"
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            of_group = f"{'the number of parameters' if name == 'params' else name} of optimizer group {number}"
            facts[of_group] = len(value) if name == "params" else _plain(value)
    for name in ("value", "target", "horizon"):
        if hasattr(controller, name):
            facts[f"kl_ctl.{name}"] = _plain(getattr(controller, name))
    return facts


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """A sum of every weight's bits that trains, where a rank holds all of it; read in a fraction of a pass's time."""
    own = ((f"optimizer's parameter {k} beside model's", one) for k, one in enumerate(beside(model, optimizer)))
    named = chain(model.named_parameters(), own)
    held = {name: x for name, x in named if x.requires_grad and not is_shard(x) and x.element_size() in _WHOLE}
    return {f"the sum of bits of {name}": bits for name, bits in zip(held, _bits(held.values()), strict=True)}


def moments(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> dict[str, int]:
    """The same of what an optimiser that has stepped holds of every parameter of the model."""
    state = {} if optimizer is None else optimizer.state
    held = {
        f"the sum of bits of optimizer's {key} of {name}": value
        for name, parameter in model.named_parameters()
        for key, value in state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor) and value.element_size() in _WHOLE
    }
    return dict(zip(held, _bits(held.values()), strict=True))


def _bits(tensors: Iterable[torch.Tensor]) -> list[int]:
    """In one transfer from each device."""
    return [int(x) for x in on_cpu([_sum(x.detach()) for x in tensors])]


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Of eight bytes each, and of what is left: sums of shorter numbers would copy them to that many first."""
    x = x.contiguous().view(-1)
    if x.storage_offset() * x.element_size() % 8:
        x = x.clone()
    whole = x.numel() - x.numel() % (8 // x.element_size())
    return x[:whole].view(torch.int64).sum() + x[whole:].view(_WHOLE[x.element_size()]).sum()


def generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of generation, those of a configuration among them."""
    config = options.get("generation_config")
    inner = config.to_dict() if isinstance(config, transformers.GenerationConfig) else {}
    found = {f"{name} of generation_config": value for name, value in inner.items()}
    found |= {f"{name} of generation_kwargs": value for name, value in options.items()}
    return {name: _plain(value) for name, value in found.items()}


def models(model: nn.Module, ref_model: Any) -> dict[str, Any]:
    """What both compute; of the policy every tensor's shape, kind and whether it trains, of a reference its beginning.

    Of how attention is computed too, which rounds differently: ranks that go on together must not.
    """
    facts: dict[str, Any] = {
        "the class of model": type(model).__name__,
        "ref_model": None if ref_model is None else f"{type(ref_model).__name__} with weights {_beginning(ref_model)}",
    }
    for name, one in {"model": model, "ref_model": ref_model}.items():
        if one is not None:
            facts[f"the attention of {name}"] = getattr(transformers_model(one).config, "_attn_implementation", None)
            facts |= {f"{fact} of {name}": value for fact, value in computed_by(one).items()}
    return facts | {f"{name} of model": _described(tensor) for name, tensor in _tensors(model)}


def tokens(tokenizer: Any) -> dict[str, Any]:
    """How many a tokenizer knows, and which of them are special."""
    return {
        "the number of tokens of tokenizer": len(tokenizer) if hasattr(tokenizer, "__len__") else None,
        "the special tokens of tokenizer": sorted(getattr(tokenizer, "all_special_ids", ())),
    }


def data(dataset: Any) -> dict[str, Any]:
    """How many rows there are, and a digest of the prompts, where they can be read twice."""
    if dataset is None:
        return {"dataset": None}
    return {
        "the class of dataset": type(dataset).__name__,
        "the number of rows of dataset": len(dataset) if hasattr(dataset, "__len__") else None,
        "the digest of dataset's prompts": prompt_digest(dataset),
    }


def versions() -> dict[str, Any]:
    """Of what computes: another one may round differently."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "the processor": torch.backends.cpu.get_cpu_capability(),
        "the number of threads": torch.get_num_threads(),
        "the GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _checkpointing(model: nn.Module) -> str:
    """Ranks meet in other places where a backward pass makes others within it."""
    return "re-entrant" if recomputes_within_backward(model) else "on" if recomputes(model) else "off"


def _tensors(model: nn.Module) -> "chain[tuple[str, torch.Tensor]]":
    return chain(model.named_parameters(), model.named_buffers())


def _described(tensor: torch.Tensor) -> str:
    trains = ", trains" if tensor.requires_grad else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}{trains}"


def _beginning(model: nn.Module) -> str:
    """A digest of every tensor's first numbers: enough to tell another checkpoint, and read in no time."""
    digest = sha256()
    for name, tensor in _tensors(model):
        if name.startswith(HEAD_PREFIX):
            continue  # nothing reads a reference's values, and every rank may have drawn a head of its own
        digest.update(f"{name} {_described(tensor)}".encode())
        if tensor.numel() and not tensor.is_meta and not is_shard(tensor):  # parts differ between ranks
            row = tensor.detach()[(0,) * (tensor.ndim - 1)] if tensor.ndim else tensor.detach()[None]
            digest.update(as_bytes(row[:_FIRST]).numpy().tobytes())
    return digest.hexdigest()[:12]


def _plain(value: Any) -> Any:
    """A number, a text or a list of them; of anything else its kind, since an object's text may hold an address."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
