"""Where models live. The trainer moves rows to the policy, and no model anywhere: what does not fit is named."""

from typing import Any

from torch import nn

from ppo_runtime.models.inner import pretrained_model


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


def _devices(model: nn.Module) -> list[str]:
    return sorted({str(parameter.device) for parameter in model.parameters()})


def _is_spread(model: Any) -> bool:
    """Whether transformers has spread it over devices, and moves what goes from one to the next."""
    return len(set((getattr(pretrained_model(model), "hf_device_map", None) or {}).values())) > 1
