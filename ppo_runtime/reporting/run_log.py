"""The log of a run: what its trackers are given, and when they are opened and closed, under the names of its parts."""

import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ppo_runtime.common import inputs
from ppo_runtime.common.files import working_directory
from ppo_runtime.common.redact import hide, plain_settings
from ppo_runtime.config import PPOConfig
from ppo_runtime.ranks.agreement import all_or_none
from ppo_runtime.ranks.world import World
from ppo_runtime.reporting.statistics import scalars, score_statistics
from ppo_runtime.reporting.tables import rollout_table
from ppo_runtime.reporting.tracking import make_trackers

logger = logging.getLogger(__name__)


class RunLog:
    """The trackers of a run, and the names of its parts in them."""

    def __init__(self) -> None:
        self._trackers: list[Any] | None = None
        self.goes_on_after: float | None = None
        """The step after which the run whose metrics lie in the directory goes on; None begins a run."""
        self.run_name = secrets.token_hex(8)
        """The name of this part of the run in them, until a checkpoint is loaded."""
        self.earlier_runs: tuple[str | None, ...] = ()
        self.begins_after = 0
        """The step that this part of the run begins after."""
        self._began_in = working_directory()
        self._missed: dict[int, list[Any]] = {}

    def go_on(self, step: int, runs: Sequence[str | None]) -> None:
        """Let what is logged next stand behind a step of earlier parts of the run, under a new name."""
        self.close()
        self._missed.clear()
        self.begins_after = step
        self.goes_on_after, self.run_name, self.earlier_runs = step, secrets.token_hex(8), tuple(runs)

    def directory(self, config: PPOConfig) -> Path:
        """Where its files go, wherever the process stands meanwhile."""
        return self._began_in / config.logging_dir

    def opened(self, config: PPOConfig, facts: Mapping[str, Any]) -> list[Any]:
        """The trackers, opened at the first use, so that a trainer that never logs leaves no file.

        Args:
            config: which trackers, and where.
            facts: what is recorded beside the settings.
        """
        if self._trackers is None:
            self._trackers = make_trackers(
                config.log_with,
                self.directory(config),
                config.tracker_kwargs,
                config.tracker_project_name,
                plain_settings(config) | dict(facts),
                goes_on_after=self.goes_on_after,
                run=self.run_name,
                earlier=self.earlier_runs,
            )
        return self._trackers

    def log(self, trackers: Sequence[Any], *entry: Any) -> None:
        """Give an entry to each tracker, behind those that the system would not let it write before."""
        for place in range(len(trackers)):
            self._missed.setdefault(place, []).append(entry)
        self.write_missed(trackers)

    def misses(self) -> bool:
        """Whether a tracker lacks an entry that the system would not let it write."""
        return any(self._missed.values())

    def write_missed(self, trackers: Sequence[Any]) -> None:
        """Give each tracker the entries that it lacks, in their order; one that it refuses goes for all of them."""
        for place, tracker in enumerate(trackers):
            while waiting := self._missed.get(place):
                entry = waiting[0]
                try:
                    tracker.log(*entry)
                except OSError:
                    raise
                except Exception:  # what is refused would be the next time as well
                    self._missed = {k: [one for one in left if one is not entry] for k, left in self._missed.items()}
                    raise
                waiting.pop(0)

    def sync(self) -> None:
        """Wait until what was logged has reached the disk, as far as trackers can tell."""
        for tracker in self._trackers or []:
            getattr(tracker, "sync", lambda: None)()

    def close(self, *, failed: bool = False) -> None:
        """Close the trackers' files; the next line opens them again and appends. See ``Trainer.close``."""
        trackers, self._trackers = self._trackers or [], None
        with ExitStack() as all_of_them:
            for tracker in trackers:
                self.goes_on_after = math.inf
                all_of_them.callback(_close, tracker, failed=failed)


def _close(tracker: Any, *, failed: bool) -> None:
    """Close a tracker; what fails there is said, and takes no other error's place."""
    try:
        tracker.close(failed=failed)
    except Exception as error:
        logger.warning(
            "%s could not be closed, and may lack the last steps: %s",
            type(tracker).__name__,
            hide(f"{type(error).__name__}: {error}"),
        )


def log_entry(
    stats: Any, batch: Any, rewards: Any, columns: Any, *, tokenizer: Any, world: World
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Numbers and table of one step, for the trackers; all ranks call it or none. See ``Trainer.log_stats``."""
    with all_or_none(world, phase="the check of what is logged"):
        for name, given in {"stats": stats, "batch": batch}.items():
            if not isinstance(given, Mapping):
                raise ValueError(f"{name} is a {type(given).__name__}, expected a dictionary")
        if isinstance(columns, str) or not isinstance(columns, Sequence):
            raise ValueError(f"columns_to_log is {columns!r}, expected a list of columns of batch")
        listed: Any = rewards.tolist() if isinstance(rewards, Tensor | np.ndarray) else rewards
        scores = inputs.score_vector(listed, count=len(listed) if isinstance(listed, Sequence) else 0, name="rewards")
        table = rollout_table(batch, columns, scores.tolist(), tokenizer)
    # Whatever ``stats`` hold: a rank that skipped this would leave the others waiting.
    return scalars(dict(stats) | score_statistics(scores, world)), table
