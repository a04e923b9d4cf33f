"""The largest tensor that an operator makes while a block runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Sees every operator, forward and backward; keeps the size and shape of the largest result.

    Parameters, their gradients and the optimiser's state are as large as the model whatever the batch, so ``shapes``
    that are known to be theirs do not count.
    """

    def __init__(self, *shapes: torch.Size) -> None:
        super().__init__()
        self.ignored = {torch.Size(shape) for shape in shapes} | {torch.Size(reversed(shape)) for shape in shapes}
        self.numel = 0
        self.shape = torch.Size()
        self.operator = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.shape not in self.ignored and leaf.numel() > self.numel:
                self.numel, self.shape, self.operator = leaf.numel(), leaf.shape, str(func)
        return result
