"""Agreement between ranks: what one of them finds wrong, all of them refuse, in the same words and at the same place.

Every function is a collective: all ranks must call it, in the same order. In a world of one, none of them needs a
process group, and none costs anything.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_runtime.ranks.presence import agreed, has_left, lost_ranks_named, place
from ppo_runtime.ranks.world import World, named

_BUILTIN = (ValueError, TypeError, RuntimeError, OSError)
_FILES = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_KINDS = {kind.__name__: kind for kind in (*_BUILTIN, *_FILES, NotImplementedError, TimeoutError)}
"""What all ranks can raise: errors that can be made of a text alone."""
_HEAD = 64
"""Numbers of the message in which ranks meet."""
_SHOWN = 5
"""How many differences a message lists."""


class Ballot:
    """What each rank tells the others at the end of a block of :func:`all_or_none`."""

    def __init__(self, size: int) -> None:
        self.mine = torch.zeros(size, dtype=torch.float64)
        self.all = self.mine[None]
        """[ranks, size], once the block is left."""
        self.facts: Callable[[], Mapping[str, Any]] = dict
        """Gives what must be the same on all ranks, by names that a sentence can begin with; not asked in a world of
        one."""
        self.advice = "expected the same on all ranks, which train one model together"
        """What to do where they differ."""


@contextmanager
def all_or_none(world: World, *, carries: int = 0, phase: str = "an agreement") -> Iterator[Ballot]:
    """Raise on all ranks if the block fails on any of them; the block itself must not use collectives,
    except within :func:`~ppo_runtime.ranks.presence.lost_ranks_named`: a rank that fails in those does not vote.

    Without this, the other ranks would wait for the failed one in their next collective.

    Where all ranks fail alike, each raises its own error. Otherwise all raise one with the same text, which names the
    ranks that failed: of the first one's kind if that is a builtin ValueError, TypeError, RuntimeError or OSError, else
    a RuntimeError that says of what kind it was. A rank's own error is its cause. One that is interrupted, or exits,
    does just that.

    Args:
        world: the ranks.
        carries: how many numbers every rank has to tell on this occasion, the same on all of them: what the block
            writes into ``mine`` of the ballot stands in its ``all`` afterwards. What it sets ``facts`` to is compared.
        phase: what the block is, to be said where a rank never comes to its end.
    """
    ballot, error = Ballot(carries), None
    if world.size == 1:
        yield ballot
        ballot.all = ballot.mine[None]
        return
    facts: Mapping[str, Any] = {}
    try:
        yield ballot
        facts = ballot.facts()
        told = torch.cat((torch.tensor([0.0, _stamp(facts)], dtype=torch.float64), ballot.mine))
    except BaseException as found:
        if has_left(world):  # a pass that others wait in: there is no vote
            raise
        error = found
        told = torch.zeros(2 + carries, dtype=torch.float64)  # wherever the block has stopped
        told[0] = 1
    everyone = gathered(told, world, phase)
    if everyone[:, 0].any():
        _raise_together(error, world, phase)
    if (everyone[:, 1] != everyone[0, 1]).any():
        _refuse(_differences(facts, world, phase), ballot.advice)
    ballot.all = everyone[:, 2:]


def agree_any(flag: bool, world: World, phase: str = "an agreement") -> bool:
    """Whether the flag is set on any rank: the same answer everywhere, so that all stop or skip together."""
    return bool(agree_largest(flag, world, phase))


def agree_largest(number: int, world: World, phase: str = "an agreement") -> int:
    """The largest of the ranks' integers, the same everywhere."""
    return int(gathered(torch.tensor([int(number)]), world, phase).max())


def differences(facts: Mapping[str, Any], world: World, phase: str = "a comparison") -> list[str]:
    """What differs between the ranks, in words, the same on every rank; one small collective where nothing does."""
    stamps = gathered(torch.tensor([_stamp(facts)], dtype=torch.float64), world, phase)
    return _differences(facts, world, phase) if (stamps != stamps[0]).any() else []


def gathered(vector: Tensor, world: World, phase: str) -> Tensor:
    """[n] on every rank to [size, n], one row per rank.

    What the ranks have come to goes with it, in a message whose size is always the same: those that have come to
    something else could not be told from each other by what they send, and would end in the middle of it.

    Raises:
        RuntimeError: the ranks are in different collectives, on all of them.
    """
    if world.size == 1:
        return vector[None]
    with lost_ranks_named(world, phase):
        fits = len(vector) < _HEAD
        what = {"phase": phase, "size": len(vector), "dtype": vector.dtype}
        heads = _heads(what, vector if fits else vector[:0], world)
        return heads[:, : len(vector)].to(vector.dtype) if fits else _all(vector, world)


@contextmanager
def together(world: World, phase: str) -> Iterator[None]:
    """Come to a block of collectives with all ranks: those that have come to something else are told, as in a gather.

    Like :func:`~ppo_runtime.ranks.presence.lost_ranks_named`, which tells of ranks that are lost in it.
    """
    with lost_ranks_named(world, phase):
        if world.size > 1:
            _heads({"phase": phase}, torch.zeros(0), world)
        yield


def _heads(what: Mapping[str, Any], numbers: Tensor, world: World) -> Tensor:
    """A few numbers of all ranks, each row followed by zeros, after a look whether they have come to the same."""
    head = torch.zeros(_HEAD, dtype=torch.float64)
    head[0] = _stamp(what)
    head[1 : 1 + len(numbers)] = numbers
    heads = _all(head, world)
    if (heads[:, 0] != head[0]).any():
        _raise_apart(world)
    return heads[:, 1:]


def _all(vector: Tensor, world: World) -> Tensor:
    table = vector.new_empty(world.size, len(vector))
    dist.all_gather(list(table), vector)
    return table


def _raise_apart(world: World) -> NoReturn:
    """Say where each rank is; all of them have seen that they are not in one place."""
    places: list[str] = [""] * world.size
    dist.all_gather_object(places, place(world))
    found: dict[str, list[int]] = {}
    for rank, where in enumerate(places):
        found.setdefault(where, []).append(rank)
    said = " and ".join(f"{named(ranks)} in {where}" for where, ranks in found.items())
    raise agreed(RuntimeError(f"the ranks have parted, {said}: call this on every rank, in the same order"))


def gathered_objects(value: Any, world: World, phase: str) -> list[Any]:
    """What every rank has, in rank order; anything that can be pickled."""
    everyone: list[Any] = [value] * world.size
    if world.size > 1:
        with lost_ranks_named(world, phase):
            dist.all_gather_object(everyone, value)
    return everyone


def _raise_together(error: BaseException | None, world: World, phase: str) -> NoReturn:
    """Raise what the ranks have found wrong; ``error`` is this rank's own."""
    everyone: list[tuple[str, str] | None] = gathered_objects(None if error is None else _told(error), world, phase)
    if error is not None and (not isinstance(error, Exception) or len({*everyone}) == 1):
        raise agreed(error)
    failed: dict[tuple[str, str], list[int]] = {}
    for rank, told in enumerate(everyone):
        if told is not None:
            failed.setdefault(told, []).append(rank)
    said = [f"{named(ranks)}: {text}" for (_, text), ranks in failed.items()]
    more = f"; and {len(said) - _SHOWN} more messages" if len(said) > _SHOWN else ""
    kind, _ = next(iter(failed))
    raise agreed(_KINDS[kind]("; ".join(said[:_SHOWN]) + more)) from _as_a_cause(error)


def _as_a_cause(error: BaseException | None) -> BaseException | None:
    """The error; behind another one if it stops an iteration, which contextlib would raise in place of its effect."""
    if not isinstance(error, StopIteration):
        return error
    shown = RuntimeError(repr(error))
    shown.__cause__ = error
    return shown


def _told(error: BaseException) -> tuple[str, str]:
    """The name of the kind that an error is raised as on all ranks, and its text there."""
    kind = next((kind for kind in type(error).__mro__ if _KINDS.get(kind.__name__) is kind), RuntimeError)
    try:
        text = str(error)
    except Exception as failure:  # a class of the user's own
        text = f"(its text can't be had: {type(failure).__name__})"
    name = "" if isinstance(error, _BUILTIN) else type(error).__name__
    return kind.__name__, ": ".join(filter(None, (name, text))) or kind.__name__


def _differences(facts: Mapping[str, Any], world: World, phase: str) -> list[str]:
    """Every fact that differs, with each rank's value."""
    everyone = gathered_objects({name: repr(value) for name, value in facts.items()}, world, phase)
    found: list[str] = []
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        holders: dict[str | None, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            holders.setdefault(theirs.get(name), []).append(rank)
        if len(holders) > 1:
            *said, last = (
                f"{'absent' if value is None else f'{value:.120}'} on {named(ranks)}"
                for value, ranks in holders.items()
            )
            found.append(f"{name} is {', '.join(said)} and {last}")
    return found


def _refuse(found: list[str], advice: str) -> NoReturn:
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise agreed(ValueError("; ".join(found[:_SHOWN]) + f"{more}; {advice}"))


def _stamp(facts: Mapping[str, Any]) -> float:
    """48 bits of a digest: equal on all machines and exact in float64."""
    text = repr(sorted(facts.items()))
    return float(int.from_bytes(sha256(text.encode(errors="replace")).digest()[:6], "big"))
