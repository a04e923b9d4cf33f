"""Where models live: on the device of their process, if there is one, and never half here and half there."""

import os
import platform
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from ppo_runtime.common.launcher import number_in_environment
from ppo_runtime.models.inner import pretrained_model
from ppo_runtime.ranks.presence import agreed
from ppo_runtime.ranks.world import named, speaks_nccl

AUTO = "auto"


def place(model: nn.Module, ref_model: nn.Module | None, optimizer: torch.optim.Optimizer | None, device: str) -> None:
    """Bring policy and reference to a device, and what an optimiser holds along with its parameters.

    Args:
        model: the policy. With "auto" it moves from the CPU to the GPU of this process, where there is one.
        ref_model: of its own; it comes along.
        optimizer: over parameters of the policy, which stay the same objects.
        device: "auto", or the name of a device, to which everything moves. A model that transformers has spread over
            devices, or whose weights are elsewhere, stays where it is.

    Raises:
        ValueError: there is no such device, by name.
    """
    target = _wanted(device, model)
    if target is None:
        return
    if target.type == "cuda":
        torch.cuda.set_device(target)  # where collectives look for it
    for one in (model, ref_model):
        if one is not None and (_movable(one) if device == AUTO else not _fixed(one)):
            one.to(target)
    if optimizer is not None and optimizer.state:
        optimizer.load_state_dict(optimizer.state_dict())  # which brings moments to their parameters


def _wanted(device: str, model: nn.Module) -> torch.device | None:
    """Where the setting has a policy; None if that is where it is."""
    if device == AUTO:
        on_gpu = {p.device for p in model.parameters() if p.device.type == "cuda"}
        if len(on_gpu) == 1 and not _is_spread(model):
            return on_gpu.pop()  # for the reference
        return own_gpu() if torch.cuda.is_available() and _movable(model) else None
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device is {device!r}, expected 'auto' or the name of one, such as 'cuda' or 'cpu'"
        ) from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch sees no GPU here; set device='cpu', or install its driver")
    wanted = own_gpu() if wanted == torch.device("cuda") else wanted
    try:
        torch.empty(0, device=wanted)
    except (AssertionError, ImportError, RuntimeError) as error:  # NotImplementedError is one of the last
        raise ValueError(
            f"device is {device!r}, which torch cannot use here ({str(error).splitlines()[0]:.200}); set device='cpu', "
            "or install what it needs"
        ) from error
    return wanted


def own_gpu() -> torch.device:
    """The GPU of this process: the one with its number on this machine.

    Raises:
        ValueError: there are fewer GPUs than that.
    """
    count = torch.cuda.device_count()
    number = number_in_environment(
        "LOCAL_RANK", "the number of this process on its machine", least=0, default=torch.cuda.current_device()
    )
    if count == 1:
        number = 0  # some launchers show each process its own alone
    if number >= count:
        raise ValueError(
            f"LOCAL_RANK is {number}, and torch sees {count} GPUs here, expected one for each process; start at most "
            f"{count} processes per machine, or set PPOConfig(device='cpu')"
        )
    return torch.device("cuda", number)


def check_devices(model: nn.Module, ref_model: nn.Module | None) -> None:
    """Refuse a policy or a reference that a pass could not be made with where it is.

    Raises:
        ValueError: a model has parameters without numbers (on the meta device), or on several devices although nobody
            has spread it over them, or the two are on different devices.
    """
    for name, one in {"model": model, "ref_model": ref_model}.items():
        if one is None:
            continue
        devices = _devices(one)
        if "meta" in devices:
            raise ValueError(
                f"{name} has parameters on the meta device, where tensors hold no numbers, expected all of them in "
                "memory; load it without offloading"
            )
        if len(devices) > 1 and not _is_spread(one):
            raise ValueError(
                f"{name} has parameters on {' and '.join(devices)}, expected one device; move all of it, value head "
                f"included, with {name}.to({devices[0]!r})"
            )
    if ref_model is None or _is_spread(model) or _is_spread(ref_model):
        return
    mine, theirs = _devices(model), _devices(ref_model)
    if mine and theirs and mine != theirs:
        raise ValueError(
            f"ref_model is on {theirs[0]}, expected {mine[0]} like model: both read the same rows; move it with "
            f"ref_model.to({mine[0]!r})"
        )


def own_number(model: nn.Module) -> float:
    """A number of the GPU that a policy is on, of all GPUs of all machines; 0 where ranks may share what it is on.

    With nccl each of them needs one of its own.
    """
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    if len(gpus) != 1 or not speaks_nccl():
        return 0.0
    gpu = gpus.pop()
    # What each process counts as its first may be another one, where launchers show each its own alone.
    seen = os.environ.get("CUDA_VISIBLE_DEVICES"), gpu.index
    text = f"{platform.node()} {getattr(torch.cuda.get_device_properties(gpu), 'uuid', seen)}"
    return float(int.from_bytes(sha256(text.encode()).digest()[:6], "big"))  # exact in float64


def check_own_gpus(numbers: Sequence[float]) -> None:
    """Refuse ranks that are on the same GPU, by what `own_number` gives on each.

    Raises:
        ValueError: likewise, the same on all ranks.
    """
    for number in filter(None, numbers):
        if len(ranks := [rank for rank, theirs in enumerate(numbers) if theirs == number]) > 1:
            raise agreed(
                ValueError(
                    f"{named(ranks)} have the model on the same GPU, expected one for each process; start as many "
                    "processes per machine as it has GPUs, with device='auto', or set PPOConfig(device='cpu')"
                )
            )


def _movable(model: nn.Module) -> bool:
    """Whether all of it is on the CPU, and nothing speaks against another place."""
    return _devices(model) == ["cpu"] and not _fixed(model)


def _fixed(model: Any) -> bool:
    """Whether others have put it where it is: transformers, spreading or quantising it; or it holds no numbers."""
    inner = pretrained_model(model)
    return _is_spread(model) or getattr(inner, "is_quantized", False) is True or "meta" in _devices(model)


def _devices(model: nn.Module) -> list[str]:
    return sorted({str(parameter.device) for parameter in model.parameters()})


def _is_spread(model: Any) -> bool:
    """Whether transformers has spread it over devices, and moves what goes from one to the next."""
    return len(set((getattr(pretrained_model(model), "hf_device_map", None) or {}).values())) > 1
