"""A model of which every rank holds a share (FSDP2): what its weights, gradients and moments take is divided by ranks.

In an update, torch's ``fully_shard`` gathers a layer's weights before it computes and sends the sums of its gradients
to the ranks that hold them. So every pass is made by all ranks together: one with fewer minibatches than another makes
passes that count for nothing. Phases without gradient are different: a rank may make as many passes as it likes, since
all weights are gathered once, at the beginning, and let go at the end.
"""

from __future__ import annotations

import atexit
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ppo_runtime.ranks.agreement import agree_largest, together
from ppo_runtime.ranks.parallel import Alone, Pass, Work
from ppo_runtime.ranks.presence import lost_ranks_named
from ppo_runtime.ranks.shards import on_first
from ppo_runtime.ranks.world import World

T = TypeVar("T")
U = TypeVar("U")


class Sharded(Alone):
    """Every rank holds a part of each weight, of the policy and of its reference."""

    sharded = True

    def __init__(self, model: nn.Module, world: World, units: Sequence[nn.Module], others: Sequence[Any] = ()) -> None:
        """Shard a policy, and other models that never train, in place.

        Args:
            model: the policy, the same on all ranks.
            world: the ranks.
            units: its layers, whose weights travel together.
            others: pairs of another model and its layers.
        """
        super().__init__(model, world)
        check_torch()
        _check_apart(model, [other for other, _ in others])
        self._roots = [_sharded(one, layers, world) for one, layers in ((model, units), *others)]
        self._gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self._inside = 0
        self._held: Tensor | None = None

    def check(self, *, reentrant: bool) -> None:
        """Torch gathers weights for passes that it sees in the graph."""
        if reentrant:
            raise ValueError(
                "gradient checkpointing is re-entrant, which parallelism='fsdp2' can't follow; switch it on with "
                "model.gradient_checkpointing_enable({'use_reentrant': False})"
            )

    @contextmanager
    def updating(self, *, reentrant: bool) -> Iterator[None]:
        """A step that is broken off leaves no pass behind."""
        try:
            yield
        finally:
            self._held = None
            self._roots[0].reset_iter_state()  # of passes that were broken off

    def rounds(self, update: Sequence[T]) -> list[list[tuple[T, bool]]]:
        """One by one, and as many as the rank with the most has: the last is made again, and does not count."""
        most = agree_largest(len(update), self.world, "the count of minibatches")
        more = [(update[-1], False)] * (most - len(update))
        return [[one] for one in [*((index, True) for index in update), *more]]

    def through(self, work: Work[T], made: Callable[[T], U], *, last: bool) -> U:
        """All ranks together: one that fails in the pass itself leaves others waiting for weights, and can't vote."""
        with lost_ranks_named(self.world, "a pass of an update"):
            passed = self._roots[0](work)
        return made(passed)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """It waits, whichever it is: gradients are summed in each."""
        self._held = loss

    def settle(self, *, agreed: bool) -> None:
        """Made in any case: all ranks have come here, and the sums of what no step is made on are dropped."""
        held, self._held = self._held, None
        if held is None:
            return
        self.traffic.calls += sum(_is_sharded(part) for part in self._roots[0].modules())
        self.traffic.bytes += self._gradients
        held.backward()

    def sum_gradients(self) -> None:
        """Refused: gradients of passes of one's own are summed already, or never."""
        raise ValueError(
            "parallelism is 'fsdp2', which sums the gradients of step() alone; call step(), or set parallelism='ddp'"
        )

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all weights, of the policy and the reference, once; let them go at the end."""
        if not self._inside:
            self._gather()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._let_go()

    def saved_as(self, model: nn.Module) -> dict[str, Any]:
        """The whole state, on the CPU of rank 0."""
        with together(self.world, "the gathering of weights to be saved"):
            return {"state_dict": on_first(model.state_dict(keep_vars=True), self.world.rank)}

    def _gather(self) -> None:
        with torch.inference_mode(False), together(self.world, "the gathering of weights"):
            for unit in self._units():
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()

    def _let_go(self) -> None:
        for root in self._roots:
            root.reset_iter_state()
        for unit in self._units():
            unit.set_reshard_after_forward(unit not in self._roots, recurse=False)

    def _units(self) -> Iterator[Any]:
        for root in self._roots:
            yield from (part for part in root.modules() if _is_sharded(part))


def check_torch() -> None:
    """Refuse a torch whose FSDP2 can't go on after a step that was broken off."""
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ValueError(
            f"parallelism is 'fsdp2', and torch {torch.__version__} can't take up a model again after a pass that was "
            "broken off (FSDPModule has no reset_iter_state); install torch 2.13 or later, or set parallelism='ddp'"
        )


def _sharded(model: nn.Module, layers: Sequence[nn.Module], world: World) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (world.size,))
    # Of layers that give more than hidden states; nobody here changes what they give in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    root: Any = Pass(model)
    for unit in (*layers, root):
        made: Any = fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not root)
        made.set_gradient_divide_factor(1.0)  # sums, as everywhere
        made.set_force_sum_reduction_for_comms(True)
        made.set_reduce_scatter_unused_params(True, recurse=False)
    with torch.no_grad():
        root(_nothing)  # the first pass says which is the root
    root.reset_iter_state()
    atexit.register(_let_go_of_the_group, [*map(weakref.ref, _meshes(root))])
    return root


def _meshes(root: nn.Module) -> list[Any]:
    """What holds the process group for each part that is sharded; by names that torch does not promise."""
    parts: list[Any] = [part for part in root.modules() if _is_sharded(part)]
    with suppress(AttributeError):
        return [group.mesh_info for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
    return []


def _let_go_of_the_group(meshes: Sequence[weakref.ref[Any]]) -> None:
    """Leave a process group to those who made it, who end it, and its threads, when they let go of it.

    A thread of gloo that still holds a tensor when Python ends can't give it back any more, and aborts the process.
    """
    for mesh in (found for one in meshes if (found := one()) is not None):
        mesh.shard_process_group = None
        with suppress(AttributeError):
            mesh.mesh._pg_registry.clear()


def _nothing(model: Any) -> None:
    pass


def _is_sharded(part: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(part, FSDPModule)


def _check_apart(model: nn.Module, others: Sequence[nn.Module]) -> None:
    mine = {id(parameter): name for name, parameter in model.named_parameters()}
    for other in others:
        if shared := [mine[id(parameter)] for parameter in other.parameters() if id(parameter) in mine]:
            raise ValueError(
                f"model and ref_model share {len(shared)} parameters, such as {shared[0]!r}, and parallelism='fsdp2' "
                "divides each model by itself; leave num_shared_layers out, pass a reference of its own, or set "
                "parallelism='ddp'"
            )
