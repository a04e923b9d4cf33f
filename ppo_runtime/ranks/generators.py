"""The random generators of a process: their states as a checkpoint keeps them, and how they are taken over."""

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ppo_runtime.common.wording import counted

logger = logging.getLogger(__name__)


def generator_states(shuffle: torch.Generator, device: torch.device) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators.

    Args:
        shuffle: the trainer's own.
        device: where the policy lives.
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002  set_seed seeds this generator
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
        "cuda_device": device.index if device.type == "cuda" else None,
        "device": None if (other := _other(device.type)) is None else [device.type, other.get_rng_state()],
        "shuffle": shuffle.get_state(),
    }


def restore_generators(states: Mapping[str, Any], shuffle: torch.Generator, device: torch.device) -> None:
    """Go on from those states, as far as there are devices for them; what is left over is said."""
    shuffle.set_state(states["shuffle"])
    if states["cuda"] is not None:
        _restore_cuda(states["cuda"], states.get("cuda_device"), device)
    if (own := states.get("device")) is not None:
        kind, state = own
        if kind == device.type:
            _other(kind).set_rng_state(state)
        else:
            logger.warning(
                "the checkpoint holds the random state of a %s device, and the policy is on %s: it is left out, and "
                "the run draws other numbers than it would have drawn there",
                kind,
                device,
            )
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])  # noqa: NPY002  as above
    random.setstate(states["python"])


def _other(kind: str) -> Any:
    """What keeps the generator of a device that is neither a CPU nor CUDA's, such as torch.mps; None without one."""
    module = None if kind in ("cpu", "cuda") else getattr(torch, kind, None)
    return module if hasattr(module, "get_rng_state") else None


def _restore_cuda(states: list[torch.Tensor], used: int | None, device: torch.device) -> None:
    """Each device goes on with its own state, and the policy's with that of the one where the policy was."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = dict(enumerate(states[:here]))
    if device.type == "cuda" and used is not None and used < len(states):
        given[device.index] = states[used]
    for place, state in given.items():
        torch.cuda.set_rng_state(state, place)
    if len(states) > here:
        logger.warning(
            "the checkpoint holds the random states of %s, and there are %d here: the others' are left out, and "
            "where the policy's is among them the run draws other numbers than it would have drawn there",
            counted(len(states), "CUDA device"),
            here,
        )
