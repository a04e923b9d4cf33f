"""What each process goes on with from a checkpoint: its random generators and its place in the data."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_runtime.common.launcher import speaks_for_all
from ppo_runtime.ranks.generators import generator_states, restore_generators
from ppo_runtime.ranks.seeding import mixed, set_seed
from ppo_runtime.ranks.world import World
from ppo_runtime.rollout.data import PromptBatches
from ppo_runtime.rollout.digest import digest_of, sampled_digest
from ppo_runtime.trainer import Trainer

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())


def rank_state(trainer: Trainer) -> dict[str, Any]:
    """What a process has in a checkpoint of its own: its position, and digests of the prompts that it counts in.

    That of some of them is for earlier versions, which know no other.
    """
    loader = trainer.dataloader
    some = sampled_digest(getattr(loader, "dataset", None))
    return position(trainer) | {"prompts": some, "all_prompts": digest_of(loader)}


def position(trainer: Trainer) -> dict[str, Any]:
    """The random generators of this process, and its place in the data."""
    data = _batches(trainer)
    states = generator_states(trainer.shuffle, trainer.device)
    return states | {"data": None if data is None else data.state_dict()}


def restore_position(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Go on from a position; a dataloader of the user's own begins again."""
    data = _batches(trainer)
    if state["data"] is not None and data is not None:
        data.load_state_dict(state["data"])
    if (seed := state.get("seed")) is None:
        restore_generators(state, trainer.shuffle, trainer.device)
    else:
        set_seed(seed)
        trainer.shuffle.set_state(state["shuffle"])


def source_of(world: World, ranks: int) -> int:
    """The rank whose position a process goes on from, of those that wrote the checkpoint; further ones share them."""
    return world.rank % ranks


def position_here(state: Mapping[str, Any], world: World, ranks: int, digest: str) -> dict[str, Any]:
    """The position of a process, from that of the rank that it goes on from.

    A process that was not there then has random generators of its own: their seed is drawn from the state of that
    rank, so that no two processes and no two continuations draw the same numbers.

    Args:
        state: of the rank.
        world: the processes now.
        ranks: how many there were.
        digest: SHA-256 of the rank's state.
    """
    place = state["data"]
    if place is not None and "consumed" in place:  # of format 1, in batches of one rank
        place = place | {"ranks": ranks}
    new = {} if world.rank < ranks else {"seed": mixed(int(digest[:15], 16), world.rank)}
    return {**state, "data": place, **new}


def check_data(source: Path, state: Mapping[str, Any], trainer: Trainer) -> None:
    """Refuse a place in other data than these, as far as that can be seen."""
    then, data = state["data"], _batches(trainer)
    if then is None or data is None:
        if trainer.dataloader is not None:
            logger.warning("the checkpoint's place in the data is not known here: the data begins again")
        return
    advice = "pass the dataset of then, or start a new run from the saved model"
    if then.get("rows", data.rows) != data.rows:
        raise ValueError(
            f"{source} was made with a dataset of {then['rows']} rows, and this one has {data.rows}; {advice}"
        )
    loader = trainer.dataloader
    if (prompts := state.get("all_prompts")) is not None:
        now = digest_of(loader, again=True)
    elif (prompts := state.get("prompts")) is not None:  # of before, of some of them alone
        now = sampled_digest(getattr(loader, "dataset", None))
    else:
        return
    if now not in (None, prompts):
        raise ValueError(f"{source} was made with a dataset of other prompts; {advice}")


def check_world(source: Path, config: Mapping[str, Any], ranks: int, trainer: Trainer) -> None:
    """Refuse another number of sequences per step; say what another number of processes means.

    As many sequences on more or fewer processes are the same step: the order of the prompts is that of all ranks
    together, losses and statistics are over all of them.

    Args:
        source: the checkpoint.
        config: its settings.
        ranks: how many processes wrote it.
        trainer: which shall go on from it.
    """
    size, now = trainer.world.size, trainer.config.batch_size
    then = config.get("batch_size", now)
    if then * ranks != now * size:
        advice = f"set batch_size to {then * ranks // size}"
        if then * ranks % size:
            advice = f"start a number of processes that divides {then * ranks}, and set batch_size to the quotient"
        raise ValueError(
            f"{source} was made with batch_size {then} on {ranks} ranks, {then * ranks} sequences a step, and here it "
            f"is {now} on {size}, {now * size}; {advice}"
        )
    if ranks != size:
        logger.warning(
            "%s was written by %d ranks and goes on with %d: the order of the prompts and all states go on; which rank "
            "has which rows, and so what is sampled for them, is another%s",
            source,
            ranks,
            size,
            f", and ranks from {ranks} on draw from new seeds" if size > ranks else "",
        )


def _batches(trainer: Trainer) -> PromptBatches | None:
    """What knows the place in the data; a dataloader of the user's own does not."""
    batches = getattr(trainer.dataloader, "batch_sampler", None)
    return batches if isinstance(batches, PromptBatches) else None
