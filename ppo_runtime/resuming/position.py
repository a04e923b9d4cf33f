"""What each process goes on with from a checkpoint: its random generators and its place in the data."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_runtime.ranks.generators import generator_states, restore_generators
from ppo_runtime.rollout.data import PromptBatches, prompt_digest
from ppo_runtime.trainer import Trainer

logger = logging.getLogger(__name__)


def rank_state(trainer: Trainer) -> dict[str, Any]:
    """What a process has in a checkpoint of its own: its position, and a digest of the prompts that it counts in."""
    return position(trainer) | {"prompts": prompt_digest(getattr(trainer.dataloader, "dataset", None))}


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
    restore_generators(state, trainer.shuffle, trainer.device)


def check_data(source: Path, state: Mapping[str, Any], trainer: Trainer) -> None:
    """Refuse a place in data of another length; say where the data itself differs, as far as that can be seen."""
    then, data = state["data"], _batches(trainer)
    if then is None or data is None:
        if trainer.dataloader is not None:
            logger.warning("the checkpoint's place in the data is not known here: the data begins again")
        return
    if then.get("rows", data.rows) != data.rows:
        raise ValueError(
            f"{source} was made with a dataset of {then['rows']} rows, and this one has {data.rows}; pass the dataset "
            "of then, or start a new run from the saved model"
        )
    prompts = prompt_digest(trainer.dataloader.dataset) if trainer.dataloader is not None else None
    if prompts is not None and state.get("prompts") not in (None, prompts):
        logger.warning("the run goes on with other prompts than the checkpoint's")


def _batches(trainer: Trainer) -> PromptBatches | None:
    """What knows the place in the data; a dataloader of the user's own does not."""
    batches = getattr(trainer.dataloader, "batch_sampler", None)
    return batches if isinstance(batches, PromptBatches) else None
