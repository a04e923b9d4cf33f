"""How the ranks share a model in an update: each passes its own rows through all of it, and gradients are summed.

Gradients are *summed*, not averaged: losses are divided by global weights, so that no result depends on how a batch was
split. Torch's DistributedDataParallel does it, a bucket of gradients at a time while the others are still being made,
on the devices where they are. What it needs beside them lives as long as the updates of one step: between steps no
memory is taken, nothing of a step that was broken off is left, and what trains may be something else in the next one.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ppo_runtime.ranks.gather import sum_gradients
from ppo_runtime.ranks.world import World

T = TypeVar("T")
U = TypeVar("U")
Work = Callable[[Any], T]
"""A forward pass of the model that it is given."""


@attrs.define
class Traffic:
    """What has been sent to sum gradients, for benchmarks to read and to set to 0."""

    calls: int = 0
    bytes: int = 0
    """Of gradients that this rank has given to be summed; where models are divided, of every minibatch."""
    seconds: float = 0.0
    """From each call until its sum was there, side by side with others; on a GPU, until it was asked for. Not measured
    where models are divided: torch makes those calls itself."""


class Alone:
    """A world of one: passes and backward passes as they are."""

    sharded = False
    """Whether a rank holds a part of the weights, so that every pass of the model is made by all ranks together."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.world = model, world
        self.traffic = Traffic()

    def check(self, *, reentrant: bool) -> None:
        """Refuse what updates can't follow, while ranks can still agree on it; see `updating`."""

    def updating(self, *, reentrant: bool) -> AbstractContextManager[None]:
        """A context for the updates of a step.

        Args:
            reentrant: whether a backward pass makes others within it, which leave no trace in its graph.
        """
        return nullcontext()

    def rounds(self, update: Sequence[T]) -> list[list[tuple[T, bool]]]:
        """The minibatches of an update, in groups after which ranks meet, and whether each of them counts."""
        return [[(index, True) for index in update]]

    def through(self, work: Work[T], made: Callable[[T], U], *, last: bool) -> U:
        """What is ``made`` of a pass with gradient; ``last`` in its round."""
        return made(work(self.model))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The backward pass of one; where the ranks meet in the last of a round, it waits until they have agreed."""
        loss.backward()

    def settle(self, *, agreed: bool) -> None:
        """Make the backward pass that has waited, in which gradients are summed; or drop it."""

    def sum_gradients(self) -> None:
        """Sum the gradients that passes of somebody else's have left."""

    def whole(self) -> AbstractContextManager[None]:
        """A context in which all weights are at hand, for passes without gradient; all ranks enter it together.

        The model's parameters are plain tensors inside. What is written to them is lost where they are shards outside.
        """
        return nullcontext()

    def saved_as(self, model: nn.Module) -> dict[str, Any]:
        """Arguments for a model's ``save_pretrained``, which rank 0 alone calls; all ranks call this before."""
        return {}


class Replicated(Alone):
    """Every rank holds the whole model."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(model, world)
        self._ddp: DistributedDataParallel | None = None
        self._held: Tensor | None = None
        self._reentrant = False

    @contextmanager
    def updating(self, *, reentrant: bool) -> Iterator[None]:
        """What torch's engine needs lives in it."""
        self._reentrant = reentrant
        try:
            yield
        finally:
            self._forget()

    def through(self, work: Work[T], made: Callable[[T], U], *, last: bool) -> U:
        """The gradients of the last one will be summed while they are made."""
        if self._reentrant:
            return made(work(self.model))
        ddp = self._wrapped()
        with nullcontext() if last else ddp.no_sync():
            return ddp(lambda model: made(work(model)))  # torch looks for what the loss alone does not read

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """All but the last, at once."""
        if last:
            self._held = loss
        else:
            loss.backward()

    def settle(self, *, agreed: bool) -> None:
        """The last, of all ranks together."""
        held, self._held = self._held, None
        if not agreed:
            self._forget()  # it waits for the gradients of a pass that is not made
        elif held is not None:
            held.backward()
            if self._reentrant:
                self.sum_gradients()

    def sum_gradients(self) -> None:
        """One by one, after the fact."""
        sum_gradients(self.model.parameters(), self.world)

    def _wrapped(self) -> DistributedDataParallel:
        if self._ddp is None:
            known = inspect.signature(DistributedDataParallel).parameters
            untouched: dict[str, Any] = {
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
            }
            self._ddp = DistributedDataParallel(
                _Watched(self.model),
                init_sync=False,  # weights are the same on all ranks already
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
                **untouched,
            )
            # Torch reads annotations of a hook, and wants its types themselves.
            self._ddp.register_comm_hook(self.traffic, lambda traffic, bucket: _summed(traffic, bucket))
        return self._ddp

    def _forget(self) -> None:
        self._ddp = self._held = None


class Pass(nn.Module):
    """A forward pass of a model as torch's engines see one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Work[T]) -> T:
        """What the work makes of the model."""
        return work(self.model)


class _Watched(Pass):
    """One with a parameter that no pass reads.

    Torch looks in every pass for those without a gradient, since nobody knows beforehand whether there are any, and
    complains on the terminal where it finds none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        like = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.unread = nn.Parameter(torch.zeros_like(like.flatten()[:1]))


def _summed(traffic: Traffic, bucket: Any) -> torch.futures.Future[Tensor]:
    """The sum over ranks of a bucket of gradients, when it is there."""
    buffer = bucket.buffer()
    traffic.calls += 1
    traffic.bytes += buffer.nbytes
    started = time.perf_counter()

    def done(future: Any) -> Tensor:
        traffic.seconds += time.perf_counter() - started
        return future.value()[0]

    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None
    return work.get_future().then(done)
