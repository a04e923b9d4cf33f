"""Batches that could not be trained on, kept for inspection: their tensors, what is not finite in them, and why.

``<logging_dir>/not-finite/step-<n>.safetensors`` (``step-<n>-rank-<r>`` of several ranks) holds tokens, masks, scores,
and whatever was computed of them by then; the JSON file beside it says in words what was found. Further batches of the
same step, as after one that was dropped, are ``step-<n>-2`` and so on.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ppo_runtime.common.errors import chained
from ppo_runtime.common.files import free_place, working_directory, write_whole
from ppo_runtime.common.inputs import NotFinite
from ppo_runtime.common.redact import plain_settings
from ppo_runtime.config import PPOConfig
from ppo_runtime.learning.guards import INSPECTED, WHAT_TO_DO
from ppo_runtime.learning.update import Progress
from ppo_runtime.ranks.world import World

logger = logging.getLogger(__name__)  # each rank says what it has kept itself

MOST = 3
"""Batches that a process keeps: the first ones are those that tell."""
FOLDER = "not-finite"
_PADDING = -1


@attrs.define
class Watched:
    """What is known of a batch, as its step goes on."""

    queries: Any
    responses: Any
    scores: Any
    masks: Any
    computed: dict[str, Any] = attrs.field(factory=dict)
    """Tensors by name."""


class Inspection:
    """Keeps the batches of a trainer's steps that met numbers which are not finite, up to :data:`MOST` of them."""

    def __init__(self) -> None:
        self.kept = 0
        self._told = False
        self._began_in = working_directory()

    @contextmanager
    def watching(
        self, watched: Watched, progress: Progress, *, step: int, config: PPOConfig, world: World
    ) -> Iterator[None]:
        """Keep the batch if the block refuses it, or leaves out updates, for such numbers; errors go on their way."""
        try:
            yield
        except Exception as error:
            if (cause := not_finite(error)) is not None:
                rows = None if progress.update is None else torch.cat(progress.update).tolist()
                self._keep(watched, str(cause), rows, step=step, config=config, world=world)
            raise
        for cause, update in progress.left_out:
            if cause in INSPECTED:
                why = f"an update was left out: {WHAT_TO_DO[cause]}"
                self._keep(watched, why, torch.cat(update).tolist(), step=step, config=config, world=world)
                return

    def _keep(
        self, watched: Watched, why: str, rows: list[int] | None, *, step: int, config: PPOConfig, world: World
    ) -> None:
        if self.kept >= MOST:
            return
        if not (config.project_kwargs or (self._began_in / config.logging_dir).is_dir()):
            if self._told:
                return
            self._told = True  # a trainer that logs nothing leaves nothing
            logger.warning(
                "the batch of step %d is not kept for inspection, since the run has no directory; name one with "
                "project_kwargs={'logging_dir': ...}",
                step,
            )
            return
        self.kept += 1
        rank = f"-rank-{world.rank}" if world.size > 1 else ""
        try:
            path = keep_batch(
                free_place(
                    self._began_in / config.logging_dir / FOLDER / f"step-{step}{rank}",
                    endings=(".safetensors", ".json"),
                ),
                watched,
                {"step": step, "rank": world.rank, "why": why, "rows": rows, "settings": plain_settings(config)},
            )
        except Exception as error:  # of the disk, or of what was given for a batch: training is worth more
            logger.warning("the batch of step %d could not be kept for inspection: %s", step, error)
            return
        logger.warning(
            "the batch of step %d is kept for inspection in %s (look at it with safetensors.torch.load_file), and %s "
            "says what was found",
            step,
            path,
            path.with_suffix(".json").name,
        )


def keep_batch(place: Path, watched: Watched, record: Mapping[str, Any]) -> Path:
    """Write a batch and a record of it, each file whole, and return the path of its tensors.

    Args:
        place: the path of both files without their endings.
        watched: the batch; what in it is no batch is left out.
        record: what is known beside it; the counts of what is not finite are added.
    """
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in _tensors(watched).items()}
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path := place.with_name(f"{place.name}.safetensors"), save(tensors))
    found = {name: numbers for name, x in tensors.items() if (numbers := _found(x))}
    content = dict(record) | {"found": found, "padding": {"queries": _PADDING, "responses": _PADDING}}
    write_whole(path.with_suffix(".json"), json.dumps(content, indent=2, default=str) + "\n")
    return path


def _tensors(watched: Watched) -> dict[str, Tensor]:
    given = {
        "queries": _padded(watched.queries, _PADDING),
        "responses": _padded(watched.responses, _PADDING),
        "response_masks": _padded(watched.masks, 0),
        "given_scores": _numbers(watched.scores),
    }
    return {name: x for name, x in (given | watched.computed).items() if isinstance(x, Tensor)}


def _padded(rows: Any, value: int) -> Tensor | None:
    """Rows as one tensor; None where they are no rows of tokens."""
    try:
        return pad_sequence([torch.as_tensor(row).cpu() for row in rows], batch_first=True, padding_value=value)
    except (RuntimeError, TypeError, ValueError):
        return None


def _numbers(scores: Any) -> Tensor | None:
    """Scores as float64, infinite where one is larger than that; None where they are no numbers."""
    try:
        return torch.tensor([_number(score) for score in scores], dtype=torch.float64)
    except (RuntimeError, TypeError, ValueError):
        return None


def _number(score: Any) -> float:
    try:
        return float(score)
    except OverflowError:
        return math.inf


def _found(x: Tensor) -> dict[str, Any] | None:
    """Of numbers: how many are not finite, the place of the first, and the largest of the others."""
    if not x.is_floating_point() or x.numel() == 0:
        return None
    finite = x.isfinite()
    first = (~finite).nonzero()
    largest = float(x[finite].abs().max()) if bool(finite.any()) else None
    return {"not_finite": len(first), "first": first[0].tolist() if len(first) else None, "largest": largest}


def not_finite(error: BaseException | None) -> NotFinite | None:
    """What an error says, or was made of, if numbers that are not finite are to blame."""
    return next((found for found in chained(error, contexts=False) if isinstance(found, NotFinite)), None)
