"""Whether a PEFT policy without its adapter will do for its reference: it stays, and it is the model of before.

What peft switches off is an adapter's own layers. Biases that train in the base itself stay in force, and some ways of
initialising an adapter move part of the base into it.
"""

import logging
from typing import Any

import torch

from ppo_runtime.models.heads import probe_logits
from ppo_runtime.models.inner import transformers_model
from ppo_runtime.models.modes import dropout_off
from ppo_runtime.models.precision import is_widened
from ppo_runtime.models.references import reference_context

logger = logging.getLogger(__name__)

# Beginnings that leave the policy's outputs as they are, in whichever field: where outputs differ all the same,
# the adapter has been trained.
_NEUTRAL_BEGINNINGS = (True, "gaussian", "eva")


def check_stays(model: Any) -> None:
    """Refuse a policy of which something trains that is in force without the adapter too; nothing is changed.

    Found by gradients rather than by names, so that it holds for adapters of any kind.

    Raises:
        ValueError: the reference would move with the policy, and by which parameters.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad(), dropout_off(model), reference_context(model):
        for parameter in trained.values():  # peft switches these as it likes
            parameter.requires_grad_(True)
        logits, _ = probe_logits(model)
        if not (logits.requires_grad and trained):
            return
        reached = torch.autograd.grad(logits.sum(), list(trained.values()), allow_unused=True)
    moving = [name for name, gradient in zip(trained, reached, strict=True) if gradient is not None]
    if moving:
        raise ValueError(
            f"ref_model is None, which stands for the policy without its adapter, but {len(moving)} of the parameters "
            f"that train are in force without the adapter too, such as {moving[0]!r}: the reference would move with "
            "the policy. Pass ref_model=create_reference_model(model), or leave the base frozen (bias='none' in a "
            "LoraConfig, requires_grad_(False) on what was made trainable by hand)"
        )


@torch.no_grad()
def tell_of_a_difference(model: Any) -> None:
    """Say where the policy is not its reference to begin with: at length where the adapter's beginning may be why."""
    with dropout_off(model):
        mine, real = probe_logits(model)
        with reference_context(model):
            theirs, _ = probe_logits(model)
    computed = torch.bfloat16 if is_widened(model) else transformers_model(model).dtype
    precision = max(1e-4, 4 * torch.finfo(computed).eps)
    difference = (mine - theirs)[real].abs().max().item()
    if difference <= precision * max(1.0, theirs[real].abs().max().item()):
        return
    beginnings = [text for config in _active_configs(model) for text in _unusual_beginnings(config)]
    if not beginnings:
        logger.info(
            "the policy's adapter is trained already: the reference is the policy without it, and the KL begins above 0"
        )
        return
    logger.warning(
        "the policy and its reference, which is the policy without its adapter, differ from the start (logits by up to "
        "%.3g). With %s the base below the adapter need not be the model that was loaded, and the adapter need not "
        "begin without effect: unless that base is what the policy shall stay close to, pass the original model as "
        "ref_model",
        difference,
        " and ".join(beginnings),
    )


def _active_configs(model: Any) -> list[Any]:
    inner = model.pretrained_model
    return [inner.peft_config[name] for name in inner.active_adapters if name in inner.peft_config]


def _unusual_beginnings(config: Any) -> list[str]:
    """The settings of how an adapter begins, where that may be something else than without effect."""
    return [
        f"{name}={value!r}"
        for name, value in vars(config).items()
        if name.startswith("init_") and isinstance(value, bool | str) and value not in _NEUTRAL_BEGINNINGS
    ]
