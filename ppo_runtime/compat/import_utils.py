"""TRL's ``import_utils``: what is installed, and which devices there are."""

import torch

from ppo_runtime.common.extras import can_be_found
from ppo_runtime.compat.elsewhere import attributes_of

__getattr__ = attributes_of(__name__)


def is_peft_available() -> bool:
    """Whether peft is installed."""
    return can_be_found("peft")


def is_wandb_available() -> bool:
    """Whether Weights & Biases is installed."""
    return can_be_found("wandb")


def is_rich_available() -> bool:
    """Whether rich is installed; it is a dependency here."""
    return can_be_found("rich")


def is_diffusers_available() -> bool:
    """Whether diffusers is installed; nothing here uses it."""
    return can_be_found("diffusers")


def is_torchvision_available() -> bool:
    """Whether torchvision is installed; nothing here uses it."""
    return can_be_found("torchvision")


def is_unsloth_available() -> bool:
    """Whether unsloth is installed; nothing here uses it."""
    return can_be_found("unsloth")


def is_bitsandbytes_available() -> bool:
    """Whether bitsandbytes is installed and has a GPU to work on."""
    return can_be_found("bitsandbytes") and torch.cuda.is_available()


def is_xpu_available() -> bool:
    """Whether there is an Intel GPU that torch can use."""
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def is_npu_available() -> bool:
    """Whether there is an Ascend NPU that torch can use."""
    npu = getattr(torch, "npu", None)
    return can_be_found("torch_npu") and npu is not None and npu.is_available()
