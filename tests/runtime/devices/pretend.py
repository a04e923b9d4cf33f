"""A pretended device: tensors that lie elsewhere than on the CPU for all who ask, and hold real numbers.

:class:`Pretended` wraps a tensor on the CPU and says of itself, in Python and in C++, that it is on torch's "lazy"
device. That one is there in every build, it is neither "cpu" nor "meta", and autograd runs its backward passes in the
calling thread. Every operator reaches :func:`_run`, which refuses what a GPU would refuse, notes where the host waits
for the device, and computes on what is wrapped. So numbers are real, and all control flow runs.

What it refuses: tensors of both sides in one operator, but for a number (0-d) on the CPU beside tensors of the device,
and for indices on the CPU; writing to the other side; a random generator of the other side; operators of oneDNN and
other libraries. Copies from one side to the other are what they are on a GPU: allowed, and waited for.

What it cannot show:

- that numbers of a GPU's own kernels are right, how fast they are and how much memory they take;
- branches on the name "cuda": Adam in one kernel, memory that is free, random states, an emptied cache;
- autocast, which looks for names of devices: switched off it is walked, switched on it is refused here;
- scaled dot product attention in one kernel, which this device has not: it is walked as products and a softmax;
- operators that read raw memory, and tensors in pinned memory or on streams of their own;
- waits within a kernel's own code, and whether one that is known here is short or long.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)

_aten = torch.ops.aten
_READING = {_aten.index, _aten._unsafe_index}
_WRITING = {_aten.index_put, _aten.index_put_, _aten._index_put_impl_}
# One number to the host.
_NUMBERS = {_aten._local_scalar_dense, _aten.equal}
# Results whose size only the device knows.
_SIZES = {_aten.nonzero, _aten.masked_select, _aten.bincount, _aten.repeat_interleave}
_SIZES |= {_aten._unique, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive}
# Operators that take a number on the CPU beside tensors of the device, though they are not pointwise.
_WITH_NUMBERS = {_aten.masked_fill, _aten.masked_fill_, _aten._foreach_mul, _aten._foreach_mul_}
# Whose code a wait is put down to, innermost first.
_PACKAGES = ("ppo_core", "ppo_runtime", "transformers", "peft")


class MixedDevicesError(RuntimeError):
    """An operator was given what a GPU refuses."""


class Wait(NamedTuple):
    """The host waits for all that the device has been given to do."""

    why: str
    """"number" or "rows" to the host, "rows" of another size, or an "upload" (from memory that is not pinned)."""
    operator: str
    package: str
    """Whose code asked for it."""
    site: str
    """File and line."""


class Pretended(Tensor):
    """A tensor on the pretended device."""

    held: Tensor
    """The numbers."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    # Nothing above the operators is any different.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, [])

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch refuses it for every subclass

    def data_ptr(self) -> int:
        return self.held.data_ptr()


class _Pretending(TorchDispatchMode):
    """Operators that have no pretended tensor to be told by: those that make tensors, and copies to the device."""

    def __init__(self, waits: list[Wait], *, float64: bool) -> None:
        super().__init__()
        self.waits, self.float64 = waits, float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _run(func, args, kwargs or {}, self.waits)
        leaves = tree_leaves((args, kwargs, found))
        wide = any((x.dtype if isinstance(x, Tensor) else x) is torch.float64 for x in leaves)
        if wide and not self.float64 and any(isinstance(x, Pretended) for x in leaves):
            raise TypeError(f"{func}: this device has no float64")
        return found


@contextmanager
def pretending(*, float64: bool = True) -> Iterator[list[Wait]]:
    """Inside, there is the device, with or without float64 (as MPS); gives the waits so far.

    Attention is as it is on the device, for tensors on the CPU too.
    """
    waits: list[Wait] = []
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # what torch.tensor makes is moved by an operator
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            patch.object(torch, "autocast", _autocast),
            _Pretending(waits, float64=float64),
        ):
            yield waits
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def placed(module: Any) -> Any:
    """The module with its parameters and buffers on the device, as ``to`` would leave it: what was tied still is."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is not None:
                    tensors[name] = moved.setdefault(id(x), _placed(x))
    return module


def _placed(x: Tensor) -> Tensor:
    copy = Pretended(x.detach().clone())
    return nn.Parameter(copy, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else copy


_real_autocast = torch.autocast


def _autocast(device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Any:
    if device_type != DEVICE.type:
        return _real_autocast(device_type, *args, enabled=enabled, **kwargs)
    if enabled:
        raise NotImplementedError("autocast looks for the names of devices, and does not know the pretended one")
    return nullcontext()


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: list[Wait]) -> Any:
    """Compute on what is wrapped, and wrap what comes of it, unless it goes to the CPU."""
    leaves = tree_leaves((args, kwargs))
    theirs = [x for x in leaves if isinstance(x, Pretended)]
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Pretended)]
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    there = bool(theirs) if target is None else target.type == DEVICE.type
    if not theirs and not there:
        return func(*args, **kwargs)

    copies = func.overloadpacket is _aten.copy_ or (func.overloadpacket is _aten._to_copy and target is not None)
    if not copies:
        _refuse(func, args, kwargs, theirs, others, there)
    if why := _wait(func, args, kwargs, others, there):
        waits.append(Wait(why, str(func), *_asked_by()))

    if target is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not there:
        return found
    # What an operator has written to comes back as the tensor it is.
    known = {id(x.held): x for x in theirs} | {id(x): x for x in others}

    def seen(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else Pretended(x)

    return tree_map(seen, found)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Pretended) else x


def _refuse(
    func: Any, args: Any, kwargs: dict[str, Any], theirs: list[Pretended], others: list[Tensor], there: bool
) -> None:
    """Raise where a GPU would."""
    if func.namespace not in ("aten", "prims"):
        raise MixedDevicesError(f"{func} is an operator of a CPU's, called with a tensor on the device")
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"{func}: a pretended tensor keeps the shape that it was made with")
    if there and any(isinstance(x, torch.Generator) for x in tree_leaves((args, kwargs))):
        raise MixedDevicesError(f"{func} draws on the device by a generator on the CPU")
    if not theirs or not others:
        return
    indexing = func.overloadpacket in _READING | _WRITING
    # Indices may come from the CPU, but only to tensors of the device.
    strangers = others if not indexing else [x for x in (args[0], *args[2:3]) if not isinstance(x, Pretended)]
    numbers = indexing or torch.Tag.pointwise in func.tags or func.overloadpacket in _WITH_NUMBERS
    written = _written(func, args, kwargs)
    for x in strangers:
        if x.ndim or not numbers or id(x) in written:
            raise MixedDevicesError(
                f"{func}: a tensor {tuple(x.shape)} of {x.dtype} on the CPU meets "
                f"{', '.join(f'{tuple(y.shape)} of {y.dtype}' for y in theirs)} on the device"
            )


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> set[int]:
    """Ids of what the operator writes to."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    into = [given.get(argument.name) for argument in func._schema.arguments if argument.is_write]
    return {id(x) for x in tree_leaves(into)}


def _wait(func: Any, args: Any, kwargs: dict[str, Any], others: list[Tensor], there: bool) -> str | None:
    """What the host waits for, if for anything."""
    name = func.overloadpacket
    if name is _aten.copy_:
        crossing = isinstance(args[0], Pretended) != isinstance(args[1], Pretended) and args[0].numel()
        return ("upload" if isinstance(args[0], Pretended) else "rows") if crossing else None
    if name is _aten._to_copy:
        crossing = isinstance(args[0], Pretended) != there and args[0].numel()
        return ("upload" if there else "rows") if crossing else None
    if name in _NUMBERS:
        return "number"
    if name in _SIZES:
        return "size"
    if name in _READING | _WRITING:
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            # One number to where a mask is: it is filled, whatever the size.
            return None if name in _WRITING and len(indices) == 1 and not args[2].ndim else "size"
        return "upload" if any(not isinstance(x, Pretended) for x in indices) else None
    return None


def _asked_by() -> tuple[str, str]:
    """The package, and file and line, of the innermost frame that is in one of :data:`_PACKAGES`."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        for package in _PACKAGES:
            if package in parts:
                return package, f"{'/'.join(parts[parts.index(package) :])}:{frame.f_lineno}"
        frame = frame.f_back
    return "", "nobody"
