"""A reward model that is one more adapter on the policy's trunk: low-rank weights and a small score head."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ppo_runtime.heads import hidden_states, mask_positions
from ppo_runtime.inner import import_peft, is_peft_model, pretrained_model
from ppo_runtime.modes import dropout_off

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

    Raises:
        ValueError: ``model`` has no adapter of its own, or what ``source`` holds has no score head.
    """
    if not is_peft_model(model) or model.config.is_encoder_decoder:
        raise ValueError(
            f"reward_adapter is {os.fspath(source)!r} and the model is a {type(model).__name__}, expected a "
            "decoder-only model with an adapter of its own; pass peft_config as well"
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
    model.add_adapter(name, config)
    rest = {key: value for key, value in weights.items() if _SCORE not in key}
    peft.set_peft_model_state_dict(model, rest, adapter_name=name)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.requires_grad_(False)
    device = model.get_input_embeddings().weight.device
    bias = score.get("bias")
    return RewardAdapter(name, score["weight"].to(device), None if bias is None else bias.to(device))


@torch.no_grad()
def reward_scores(wrapper: Any, adapter: RewardAdapter, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Scores [B, L, labels] in float32; the policy's adapter is active again afterwards, exceptions included."""
    model = pretrained_model(wrapper)
    active = model.active_adapter
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.set_adapter(adapter.name)
        with dropout_off(wrapper):
            hidden = hidden_states(wrapper, input_ids, attention_mask, mask_positions(attention_mask))
    finally:
        model.set_adapter(active)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
    return F.linear(hidden.float(), adapter.weight, adapter.bias)
