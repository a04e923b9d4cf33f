"""What a block of code asks of torch: every operator it runs, and the size of what each makes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operation(NamedTuple):
    """An operator that ran, by its name without namespace and overload, and the shapes of the tensors it made."""

    name: str
    made: tuple[torch.Size, ...]


class Largest(NamedTuple):
    """A tensor's number of entries and shape, and the operator that made it."""

    numel: int
    shape: torch.Size
    operator: str


class Operations(TorchDispatchMode):
    """Sees every operator while the block runs, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = tuple(leaf.shape for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.ran.append(Operation(func.overloadpacket.__name__, made))
        return result

    def count(self, *names: str) -> int:
        """How many of these operators ran."""
        return sum(operation.name in names for operation in self.ran)

    def largest(self, *ignored: tuple[int, ...]) -> Largest:
        """The largest tensor made.

        Parameters, their gradients and the optimiser's state are as large as the model whatever the batch, so shapes
        that are known to be theirs are ``ignored``, transposed as well.
        """
        theirs = {torch.Size(shape) for shape in ignored} | {torch.Size(reversed(shape)) for shape in ignored}
        made = [(shape, name) for name, shapes in self.ran for shape in shapes if shape not in theirs]
        return max((Largest(shape.numel(), shape, name) for shape, name in made), default=Largest(0, torch.Size(), ""))
