"""A reward model that is one more adapter on the policy's trunk: low-rank weights and a small score head."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ppo_runtime.models.heads import hidden_states, mask_positions
from ppo_runtime.models.inner import import_peft, is_peft_model, pretrained_model, transformers_model
from ppo_runtime.models.modes import dropout_off
from ppo_runtime.models.value_head import find_file

REWARD_ADAPTER = "reward_model_adapter"
_SCORE = ".score."


class RewardAdapter(NamedTuple):
    """The adapter's name in the PeftModel, and its score head, which never trains."""

    name: str
    weight: Tensor
    """[labels, H]."""
    bias: Tensor | None


def add_reward_adapter(model: Any, source: str | os.PathLike[str], name: str, **hub: Any) -> RewardAdapter:
    """Load a sequence-classification adapter, as peft saves it, onto a PeftModel; frozen, and not made active.

    Where that can't be, the model is as it was.

    Raises:
        ValueError: ``model`` has no adapter of its own, or one of that name already; or what ``source`` holds is no
            adapter, has no score head, or is not for this model.
    """
    if not is_peft_model(model) or model.config.is_encoder_decoder:
        raise ValueError(
            f"reward_adapter is {os.fspath(source)!r} and the model is a {type(model).__name__}, expected a "
            "decoder-only model with an adapter of its own; pass peft_config as well"
        )
    if not name or "." in name or name in model.peft_config:
        taken = " and ".join(map(repr, model.peft_config))
        raise ValueError(
            f"reward_adapter_name is {name!r}, expected a name without dots, other than {taken}, which the model has"
        )
    if find_file(source, "adapter_config.json", **hub) is None:
        raise ValueError(
            f"reward_adapter {os.fspath(source)!r} holds no adapter_config.json, expected a directory or a repository "
            "as peft saves an adapter"
        )
    peft = import_peft()
    weights: dict[str, Tensor] = peft.load_peft_weights(os.fspath(source), device="cpu", **hub)
    score = {key.rpartition(".")[2]: value.float() for key, value in weights.items() if _SCORE in key}
    if "weight" not in score:
        raise ValueError(
            f"reward_adapter {os.fspath(source)!r} holds no score head, expected an adapter trained with "
            "task_type='SEQ_CLS', such as a reward model's"
        )
    config = peft.PeftConfig.from_pretrained(os.fspath(source), **hub)
    # The head is kept here: the policy has no module of that name to put it in.
    config.modules_to_save, config.inference_mode = None, True
    config.task_type = model.active_peft_config.task_type
    if hasattr(config, "bias"):  # those of the base are the policy's too
        config.bias = "none"
    rest = {key: value for key, value in weights.items() if _SCORE not in key}
    try:
        model.add_adapter(name, config)
        _load(model, name, rest, score)
    except ValueError as error:
        if name in model.peft_config:
            model.delete_adapter(name)
        raise ValueError(
            f"reward_adapter {os.fspath(source)!r} is not for this {type(transformers_model(model)).__name__}: {error}"
            "; expected an adapter that trains nothing but itself and its score head, on the model that the policy was "
            "made from"
        ) from error
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.requires_grad_(False)
    device = model.get_input_embeddings().weight.device
    bias = score.get("bias")
    return RewardAdapter(name, score["weight"].to(device), None if bias is None else bias.to(device))


def _load(model: Any, name: str, weights: dict[str, Tensor], score: dict[str, Tensor]) -> None:
    """Fill an adapter that was just added; every weight has to have its place in it, and every place its weight."""
    peft = import_peft()
    places = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    base = model.state_dict()
    # Copies of what is in the base as well, such as embeddings that peft saves to be safe, are not needed, nor wrong.
    mine = {key: value for key, value in weights.items() if key in places or not _same(value, base.get(key))}
    problems = [f"{key} has no place in it" for key in mine if key not in places]
    problems += [f"nothing is stored for {key}" for key in places if key not in mine]
    problems += [
        f"{key} has the shape {tuple(value.shape)} and its place {tuple(places[key].shape)}"
        for key, value in mine.items()
        if key in places and value.shape != places[key].shape
    ]
    head = model.get_output_embeddings().weight.shape[1]
    if score["weight"].ndim != 2 or score["weight"].shape[1] != head:
        problems.append(
            f"its score head has the shape {tuple(score['weight'].shape)}, and hidden states {head} numbers"
        )
    if problems:
        raise ValueError(f"{problems[0]}{f', and {len(problems) - 1} more like it' if len(problems) > 1 else ''}")
    peft.set_peft_model_state_dict(model, mine, adapter_name=name)


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one.to(other), other)


@torch.no_grad()
def reward_scores(wrapper: Any, adapter: RewardAdapter, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Scores [B, L, labels] in float32; the policy's adapters are as they were afterwards, exceptions included.

    Active or not, one or several, switched off or on.
    """
    model = pretrained_model(wrapper)
    active, all_active, off = model.active_adapter, [*model.active_adapters], _switched_off(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.set_adapter(adapter.name)
        if off:
            model.base_model.enable_adapter_layers()
        with dropout_off(wrapper):
            hidden = hidden_states(wrapper, input_ids, attention_mask, mask_positions(attention_mask))
    finally:
        model.set_adapter(active)
        model.base_model.set_adapter(all_active)
        if off:
            model.base_model.disable_adapter_layers()
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
    return F.linear(hidden.float(), adapter.weight, adapter.bias)


def _switched_off(model: Any) -> bool:
    """Whether an adapter's layers are out of force, as in `reference_context`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(part.disable_adapters for part in model.modules() if isinstance(part, BaseTunerLayer))
