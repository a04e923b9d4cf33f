"""Copies between devices, few of them: each one waits until the device has done all that it was given to do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


def together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device; those that come from one and have one dtype are copied at once.

    What is there already stays as it is, with its graph; what is copied has none, and shares memory with the others.
    """
    found = list(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, x in enumerate(tensors):
        if x.device != device:
            groups.setdefault((x.device, x.dtype), []).append(place)
    for places in groups.values():
        flat = torch.cat([tensors[place].detach().reshape(-1) for place in places]).to(device)
        parts = flat.split([tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(tensors[place].shape)
    return found


def on_cpu(values: Sequence[Any]) -> list[Any]:
    """The values with those tensors among them that hold numbers brought to the CPU, so that looking waits once."""
    found = list(values)
    places = [place for place, x in enumerate(found) if isinstance(x, Tensor) and x.layout == torch.strided]
    places = [place for place in places if not found[place].is_meta]
    for place, x in zip(places, together([found[place] for place in places], CPU), strict=True):
        found[place] = x
    return found
