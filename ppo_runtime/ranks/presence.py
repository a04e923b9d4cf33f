"""Which rank was lost: where each one is, so that those that wait for it can name it.

Before a collective every rank notes in the group's store, which torchrun's agent keeps, what it comes to. Where one
then fails for want of a rank, the others read there how far each has come and why it has left, look whether its process
is still there, and say so in the same words. ``torch.distributed.monitored_barrier`` would tell this to rank 0 alone,
and not of a group that has nccl in it.
"""

import atexit
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

import attrs
import torch.distributed as dist

from ppo_runtime.ranks.world import World, named

# What errors of gloo hold, which have no class of their own: the line of its source. A callback puts words before it.
_OF_GLOO = re.compile(r"\[(enforce fail at )?(\S*/)?gloo/\S+:\d+\b|\bGloo connectFullMesh failed|^Operation timed out!")
_TOO_LATE = re.compile(r"timed out|timeout", re.IGNORECASE)
_GIVEN_UP = re.compile(r"ranks? [\d, and]+ (was|were) lost")
_PATIENCE = 3.0
"""Seconds in which the end of a process whose connections are closed can be seen."""


class RankLost(RuntimeError):
    """Another rank has ended, or does not come to where this one waits for it: there are no collectives any more."""


@attrs.define
class _Presence:
    """What this process has noted in the store of one process group."""

    world: World
    store: Any
    noted: int = 0
    """How many collectives, and blocks of them, it has come to. In step, all ranks count alike."""
    phases: list[str] = attrs.field(factory=list)
    """Those that it is in, from the widest."""
    lost: str | None = None
    """Why there can be no collective any more."""

    def come_to(self, phase: str) -> None:
        """Note where this rank is."""
        self.noted += 1
        self.phases.append(phase)
        self.store.set(f"ppo/place/{self.world.rank}", f"{self.noted} {self.place}")

    @property
    def place(self) -> str:
        """The present phase, in that which it is part of."""
        return " of ".join(reversed(self.phases))

    def leave(self, why: str) -> None:
        """Note that this rank will not come to what the others wait for, and why."""
        self.lost = f"this rank has left {self.place}, where others may wait for it still: {why}"
        with suppress(Exception):  # of the store, which may be gone already
            self.store.set(f"ppo/left/{self.world.rank}", f"{why:.2000}")

    def lose(self, error: Exception) -> str:
        """Find out which rank does not come, and note it for all: the first one to know speaks for them."""
        try:
            deadline = time.monotonic() + (0 if _TOO_LATE.search(str(error)) else _PATIENCE)
            while (found := self._ended()) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            said = found or self._missing(str(error))
            said = self.store.compare_set("ppo/lost", "", said).decode()
            if (lost := _GIVEN_UP.match(said)) and str(self.world.rank) in re.findall(r"\d+", lost[0]):
                said = f"the others have gone on without this rank: {said}"
        except Exception:  # the store went with the process that kept it
            said = f"rank 0 was lost, which kept the ranks' store: the others waited in {self.place}"
        self.lost = said
        return said

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world.size) if rank != self.world.rank]

    def _told(self, what: str, rank: int) -> str | None:
        key = f"ppo/{what}/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _ended(self) -> str | None:
        """Ranks that have left, in words; what another rank has found out already comes first."""
        if self.store.check(["ppo/lost"]):
            return self.store.get("ppo/lost").decode()
        reasons = {rank: self._told("left", rank) for rank in self._others()}
        left = {rank: reason for rank, reason in reasons.items() if reason is not None}
        if left:
            said = "; ".join(f"{named([rank])} has left: {reason}" for rank, reason in left.items())
            return f"{said}. The others waited in {self.place}"
        ended = [rank for rank in self._others() if _is_gone(self._told("process", rank))]
        return self._lost(ended, "the process has ended") if ended else None

    def _missing(self, error: str) -> str:
        """Ranks that have not come here, in words, where no process is known to have ended."""
        places = {rank: self._told("place", rank) or "0 " for rank in self._others()}
        behind = [rank for rank, place in places.items() if int(place.partition(" ")[0]) < self.noted]
        if not behind:
            return f"a rank was lost, none of this machine: the others waited in {self.place} ({error:.200})"
        if _TOO_LATE.search(error):
            return self._lost(behind, "too late; where it is no more than slow, set ranks_timeout to more seconds")
        return self._lost(behind, "the connection is closed")

    def _lost(self, ranks: list[int], why: str) -> str:
        seen = self._told("place", ranks[0])
        last = f"was last in {seen.partition(' ')[2]}" if seen else "was never seen"
        were = "was" if len(ranks) == 1 else "were"
        return f"{named(ranks)} {were} lost: {why}. The others waited in {self.place}; {named(ranks[:1])} {last}"


_here: _Presence | None = None


@contextmanager
def lost_ranks_named(world: World, phase: str) -> Iterator[None]:
    """Raise, for what a collective in the block says of a rank that ended or hangs, an error that names that rank.

    A block that this rank leaves by an error of its own is one that others may wait in: they are told why as soon as
    their connection to this process closes, and it can't come back. An error that all ranks have agreed on is none.

    Args:
        world: the ranks.
        phase: what the block is, in words that can stand behind "in": "the updates", "step 3".

    Raises:
        RankLost: in place of the collective's own error; or at once, where a rank was lost before.
    """
    if world.size == 1:
        yield
        return
    here = _presence(world)
    if here.lost is not None:
        raise RankLost(here.lost)
    depth = len(here.phases)
    try:
        here.come_to(phase)
        yield
    except RankLost:
        raise
    except BaseException as error:
        if is_agreed(error):
            raise
        if _is_of_a_collective(error):
            raise RankLost(here.lose(error)) from error
        if here.lost is None:
            here.leave(_named_by_kind(error))
        raise
    finally:
        del here.phases[depth:]


def place(world: World) -> str:
    """Where this rank is, in words."""
    return _presence(world).place


def has_left(world: World) -> bool:
    """Whether this rank has left a block that others wait in, or has lost one of them: it can't meet them again."""
    return _here is not None and _here.lost is not None and _presence(world).lost is not None


def agreed(error: BaseException) -> BaseException:
    """An error that every rank raises here, marked as such: they are still in step."""
    error.__dict__["_on_all_ranks"] = True
    return error


def is_agreed(error: BaseException) -> bool:
    """Whether every rank raises it here."""
    return "_on_all_ranks" in error.__dict__


def _is_of_a_collective(error: BaseException) -> TypeGuard[Exception]:
    """Whether torch raises it where another rank is gone, or does not come; others may speak of timeouts as well."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_OF_GLOO.search(str(error))))


def _presence(world: World) -> _Presence:
    """What this process has noted in the present group's store."""
    global _here
    store = dist.distributed_c10d._get_default_store()
    if _here is None or _here.store is not store:
        if _here is None:
            atexit.register(_tell_of_the_end)
        _here = _Presence(world, store)
        store.set(f"ppo/process/{world.rank}", f"{_machine()} {os.getpid()}")
    return _here


def _tell_of_the_end() -> None:
    """Note what ends this process, before its connections close."""
    error = getattr(sys, "last_value", None)
    if _here is not None and _here.lost is None:
        _here.leave("its script has ended" if error is None else _named_by_kind(error))


def _named_by_kind(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _machine() -> str:
    """Where process numbers mean the same; empty where that can't be told."""
    try:
        return f"{platform.node()}/{os.readlink('/proc/self/ns/pid')}".replace(" ", "")
    except OSError:
        return ""


def _is_gone(process: str | None) -> bool:
    """Whether a process of this machine has ended, by what it has noted of itself."""
    machine, _, number = (process or "").rpartition(" ")
    if not machine or machine != _machine():
        return False
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"  # ended, and its parent has not looked yet
