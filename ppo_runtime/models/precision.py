"""What trains is float32; a half-precision policy gets float32 weights and computes under bfloat16 autocast.

In bfloat16 an update of 1e-5 is rounded away wherever a weight exceeds 0.01, and in float16 Adam's epsilon is 0 and the
weights are NaN after one step. So the trainer widens a policy with half-precision parameters that train, in place
(the values are exact, and an optimiser over them stays valid), and a half-precision reference beside it, so that a
copy of the policy agrees with it to the last bit. Both then compute in bfloat16 where autocast does, float16 policies
too: float16 has no room for gradients without a loss scale.

On a CPU with instructions for it, bfloat16 saves time, not memory: a step takes a quarter less than in float32 with
oneDNN's products, and a sixth more memory, since float32 weights are kept beside those that passes have cast.

What is frozen may be half: the base of a LoRA policy, whose adapters peft keeps in float32, or the reference of a
float32 policy. Such a reference differs from the policy by rounding, and so the first KL is not quite 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ppo_runtime.common.launcher import speaks_for_all
from ppo_runtime.common.undoing import undoing
from ppo_runtime.models.inner import is_peft_model, pretrained_model, transformers_model

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())

HALF = (torch.float16, torch.bfloat16)
_COMPUTE = torch.bfloat16
# On the transformers model, so that copies and packed copies of it compute alike.
_MARK = "_ppo_runtime_autocast"


def computing(model: Any, *, weights_stay: bool = False) -> AbstractContextManager[Any]:
    """The autocast that a model's forward passes belong in; none but for a model that was widened.

    Args:
        model: in whichever wrapper.
        weights_stay: no weight changes before the end, so that each is cast once for all passes inside.
    """
    inner = transformers_model(model)
    if not is_widened(inner):
        return nullcontext()
    if weights_stay:
        return _cast_once(inner.device)
    # Cast weights are dropped with the outermost autocast alone. Kept, they would outlive this pass inside another
    # one, even one that is off: those of a pass without gradients carry none, and an update leaves them as they were.
    return torch.autocast(inner.device.type, dtype=_COMPUTE, cache_enabled=False)


@contextmanager
def _cast_once(device: torch.device) -> Iterator[None]:
    """What somebody else's autocast around has cast may be of older weights, and shall find none of these."""
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device.type, dtype=_COMPUTE):
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Computes as the models inside ask for, whatever autocast or default dtype of the caller's is around.

    Either would reach losses and advantages too, and what autocast has cast of weights would be read after their
    update.
    """
    default = torch.get_default_dtype()
    with undoing() as undo:
        undo.append(torch.clear_autocast_cache)
        if default is not torch.float32:  # it is the whole process's
            undo.append(partial(torch.set_default_dtype, default))
            torch.set_default_dtype(torch.float32)
        with torch.autocast(device.type, enabled=False):
            yield


def is_widened(model: Any) -> bool:
    """Whether a model came in half precision, trains, and is float32 for that reason."""
    return getattr(transformers_model(model), _MARK, False) is True


def check_moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimiser of one's own whose half precision `widen` cannot mend.

    Raises:
        ValueError: it steps half-precision parameters that are not the policy's, or keeps half-precision moments.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        what = names.get(id(parameter), f"of shape {tuple(parameter.shape)}, which is not the policy's")
        if parameter.dtype in HALF and parameter.requires_grad and id(parameter) not in names:
            raise ValueError(
                f"optimizer steps a parameter {what}, in {parameter.dtype}, expected the policy's own parameters; "
                "make it over the parameters of model that require grad"
            )
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dtype in HALF:
                raise ValueError(
                    f"optimizer holds {key} of the parameter {what} in {value.dtype}, expected float32: it was made of "
                    "half-precision weights; load model with dtype=torch.float32 (or call model.float()) and make a "
                    "new optimizer of that"
                )


def check_wide(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse a policy that somebody has made half-precision since `widen` was done with it.

    Raises:
        ValueError: a parameter that trains and that the optimiser steps is in half precision.
    """
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.dtype in HALF and parameter.requires_grad and id(parameter) in stepped:
            raise ValueError(
                f"the parameter {name} is {parameter.dtype}, expected float32 as when the trainer was made: small "
                "updates are lost to rounding in it; call model.float() on what trains"
            )


def widen(model: Any, reference: Any | None) -> None:
    """Make a policy that trains in half precision, and its half-precision reference, float32 in place, and say so.

    Of a PEFT policy only what trains is widened, and what is as small as a norm: its frozen base keeps its dtype. Where
    the value head alone trains in half precision, it alone is widened, and the language model computes as it did.
    """
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype in HALF]
    if half:
        dtype = model.get_parameter(half[0]).dtype
        mark = trains_half(model)
        small_as_well, all_of_it = mark, mark and not is_peft_model(pretrained_model(model))
        for tensor in _half_tensors(model):
            if tensor.requires_grad or all_of_it or (small_as_well and tensor.ndim < 2):
                _widen(tensor)
        if mark:
            setattr(transformers_model(model), _MARK, True)
        logger.warning(
            "%d parameters of the policy train in %s (the first: %s), where small updates are lost to rounding: they "
            "are float32 from here on%s. Load the model with dtype=torch.float32 to compute in float32%s",
            len(half),
            dtype,
            half[0],
            ", and forward passes compute under bfloat16 autocast" if mark else "",
            ", or train an adapter (peft_config=...) to keep it small" if mark else "",
        )
    if reference is not None and is_widened(model) and is_half(reference):
        for tensor in _half_tensors(reference):
            _widen(tensor)
        setattr(transformers_model(reference), _MARK, True)


def trains_half(model: Any) -> bool:
    """Whether anything of the language model trains in half precision, which `widen` will end."""
    return any(p.requires_grad and p.dtype in HALF for p in pretrained_model(model).parameters())


def is_half(model: nn.Module) -> bool:
    """Whether any parameter or buffer is in half precision."""
    return any(True for _ in _half_tensors(model))


def _half_tensors(model: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.dtype in HALF)


def _widen(tensor: Tensor) -> None:
    tensor.grad = None
    tensor.data = tensor.data.float()
