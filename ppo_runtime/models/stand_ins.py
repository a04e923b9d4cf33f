"""Another forward pass for layers, for the length of a block and not a call longer.

Blocks end by errors and by Ctrl-C too, and one that comes while they end may leave something behind. So a stand-in
knows whether its block is still on: one that was left behind takes itself away at the next pass, which is the layer's
own, and counts as nothing where another block begins. So does what a copy of the layer has of it, or a pickle: a copy
computes with weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

from torch import nn

from ppo_runtime.common.undoing import undoing


@contextmanager
def standing_in(layers: Iterable[nn.Module], make: Callable[[Any], Callable[..., Any]], **flags: Any) -> Iterator[None]:
    """Inside, each layer computes by what ``make`` gives for it.

    Args:
        layers: whatever they have for a forward pass is theirs again afterwards.
        make: from a layer to its forward pass.
        flags: attributes that are others inside, where a layer has them itself.
    """
    with undoing() as undo:
        block = _Block()  # lives in this frame alone
        for layer in layers:
            before = _without_leftovers(layer)
            theirs = {name: value for name, value in flags.items() if name in before}
            before = {name: before[name] for name in ("forward", *theirs) if name in before}
            stand_in = _StandIn(layer, make(layer), ref(block), theirs, before)
            undo.append(stand_in.take_away)
            stand_in.put()
        yield


def has_own_forward(layer: nn.Module) -> bool:
    """Whether somebody has given this very layer a forward pass, or a block that is on has."""
    return "forward" in _without_leftovers(layer)


class _Block:
    """Dies with the block, however that ends."""


class _StandIn:
    """A forward pass in the place of another."""

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable[..., Any] | None,
        block: Callable[[], Any],
        flags: dict[str, Any],
        before: dict[str, Any],
    ) -> None:
        self.layer, self.forward, self.block, self.flags, self.before = layer, forward, block, flags, before

    def __reduce__(self) -> tuple[Any, ...]:
        return _StandIn, (self.layer, None, _over, self.flags, self.before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.forward is not None and self.block() is not None:
            return self.forward(*args, **kwargs)
        self.take_away()
        own = self.before.get("forward") or partial(type(self.layer).forward, self.layer)
        return own(*args, **kwargs)

    def put(self) -> None:
        # A module's own attribute goes before the method of its class.
        vars(self.layer).update(self.flags | {"forward": self})

    def take_away(self) -> None:
        """Unless it is gone, or somebody has put something else there since."""
        own = vars(self.layer)
        if own.get("forward") is self:
            own.update(self.before)
            if "forward" not in self.before:
                del own["forward"]


def _over() -> None:
    """The block of a copy, which is in none."""


def _without_leftovers(layer: nn.Module) -> dict[str, Any]:
    """A layer's own attributes, as they are once nothing of a block that is over stands there."""
    own = dict(vars(layer))
    while isinstance(found := own.get("forward"), _StandIn) and found.block() is None:
        del own["forward"]
        own |= found.before
    return own
