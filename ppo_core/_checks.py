"""Static checks of the arguments of every public function: shape, dtype and device, never values.

A check reads only what is known without looking at numbers, so it costs nothing inside a compiled graph and works
under ``torch.func.vmap``. Every message names the argument, what it is, what was expected and what to do.
"""

from functools import reduce

import torch
from torch import Tensor


def check_floating(**tensors: Tensor) -> None:
    """Refuse anything but floating-point tensors."""
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
        if not tensor.dtype.is_floating_point:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, expected a floating-point dtype; convert with {name}.float()"
            )


def check_boolean(**tensors: Tensor) -> None:
    """Refuse anything but boolean tensors: an integer mask hides whether it was meant as counts or as indices."""
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
        if tensor.dtype != torch.bool:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, expected torch.bool (True = counts); convert with {name}.bool()"
            )


def check_integer(**tensors: Tensor) -> None:
    """Refuse anything but int64 tensors."""
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected torch.int64; convert with {name}.long()")


def check_axis(axis: str, **tensors: Tensor) -> None:
    """Refuse tensors without a last axis, which is called ``axis``."""
    for name, tensor in tensors.items():
        if tensor.ndim < 1:
            raise ValueError(f"{name} has no axes, expected [*batch, {axis}]; add one with {name}[None]")


def check_without_axis(axis: str, like_name: str, like: Tensor, **tensors: Tensor) -> None:
    """Refuse tensors that do not match ``like`` without its last axis, which is called ``axis`` and has to be there."""
    check_axis(axis, **{like_name: like})
    check_shape(f"{like_name} without its {axis} axis", tuple(like.shape[:-1]), **tensors)
    check_same_device(like_name, like, **tensors)


def check_same_shape(like_name: str, like: Tensor, **tensors: Tensor) -> None:
    """Refuse silent broadcasting and mixed devices: every tensor must match ``like``."""
    check_shape(like_name, tuple(like.shape), **tensors)
    check_same_device(like_name, like, **tensors)


def check_same_device(like_name: str, like: Tensor, **tensors: Tensor) -> None:
    """Refuse tensors that do not live where ``like`` does."""
    for name, tensor in tensors.items():
        if tensor.device != like.device:
            raise ValueError(
                f"{name} is on {tensor.device}, expected {like.device} like {like_name}; "
                f"move it with {name}.to({like_name}.device)"
            )


def check_bundles(**bundles: tuple[Tensor, ...]) -> None:
    """Refuse named tuples whose fields, all together, are not floating-point tensors of one shape on one device."""
    fields: dict[str, Tensor] = {}
    for name, bundle in bundles.items():
        # Of the type: older compilers cannot iterate over the attribute of an instance.
        names = getattr(type(bundle), "_fields", None)
        if names is None:
            raise TypeError(f"{name} is a {type(bundle).__name__}, expected a named tuple of tensors")
        fields |= {f"{name}.{field}": value for field, value in zip(names, bundle, strict=True)}
    check_floating(**fields)
    like_name, like = next(iter(fields.items()))
    check_same_shape(like_name, like, **fields)


def check_broadcasts(like_name: str, like: Tensor, **tensors: Tensor) -> None:
    """Refuse tensors that do not broadcast to ``like``, or would make the result larger."""
    for name, tensor in tensors.items():
        larger = tensor.ndim > like.ndim
        # A list, as older compilers cannot step through a generator. Axes are counted from the last.
        if larger or [n for axis, n in enumerate(tensor.shape) if n not in (1, like.shape[axis - tensor.ndim])]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected one that broadcasts to {tuple(like.shape)} "
                f"like {like_name}"
            )


def check_shape(like_name: str, expected: tuple[int, ...], **tensors: Tensor) -> None:
    """Refuse tensors whose shape is not ``expected``, which is the shape of (or follows from) ``like_name``."""
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected} like {like_name}")


def check_number(**tensors: Tensor) -> None:
    """Refuse tensors that are not one floating-point number."""
    check_floating(**tensors)
    for name, tensor in tensors.items():
        if tensor.ndim:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected (): one number for all; take one entry of it"
            )


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Promote to one common dtype of at least float32.

    bfloat16 keeps 8 bits of mantissa: a sum of 300 ones in it is 256. Everything in this package therefore
    computes, and answers, in float32 or wider; inputs in half precision are widened and never narrowed back.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
