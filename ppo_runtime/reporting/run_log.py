"""The trackers of a run: opened at the first use, closed and opened again, always under the name of the run."""

import math
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import Tensor

from ppo_runtime.common import inputs
from ppo_runtime.common.redact import plain_settings
from ppo_runtime.config import PPOConfig
from ppo_runtime.ranks.gather import World
from ppo_runtime.reporting.statistics import scalars, score_statistics
from ppo_runtime.reporting.tables import rollout_table
from ppo_runtime.reporting.tracking import make_trackers


class RunLog:
    """Statistics and texts of every step, for files and services.

    Args:
        config: which trackers, and where.
        world: the ranks, of which the first writes.
        tokenizer: for texts that are given as token ids.
        facts: what is recorded beside the settings.
    """

    def __init__(self, config: PPOConfig, world: World, tokenizer: Any, facts: Mapping[str, Any]) -> None:
        self.config = config
        self.world = world
        self.tokenizer = tokenizer
        self.facts = facts
        self._trackers: list[Any] | None = None
        self.goes_on_after: float | None = None
        """The step after which the run whose metrics lie in the directory goes on; None begins a run."""
        self.run_name = secrets.token_hex(8)
        """The name of this part of the run in them, until a checkpoint is loaded."""
        self.earlier_runs: tuple[str | None, ...] = ()

    def go_on(self, step: int, runs: Sequence[str | None]) -> None:
        """Let what is logged next stand behind a step of earlier parts of the run, under a new name."""
        self.close()
        self.goes_on_after, self.run_name, self.earlier_runs = step, secrets.token_hex(8), tuple(runs)

    @property
    def trackers(self) -> list[Any]:
        """Opened at the first use, so that a trainer that never logs leaves no file."""
        if self._trackers is None:
            self._trackers = make_trackers(
                self.config.log_with,
                self.config.logging_dir,
                self.config.tracker_kwargs,
                self.config.tracker_project_name,
                plain_settings(self.config) | dict(self.facts),
                goes_on_after=self.goes_on_after,
                run=self.run_name,
                earlier=self.earlier_runs,
            )
        return self._trackers

    def write(self, step: int, stats: Any, batch: Any, rewards: Any, columns: Any) -> None:
        """Log one step, on every rank; see ``Trainer.log_stats``."""
        for name, given in {"stats": stats, "batch": batch}.items():
            if not isinstance(given, Mapping):
                raise ValueError(f"{name} is a {type(given).__name__}, expected a dictionary")
        if isinstance(columns, str) or not isinstance(columns, Sequence):
            raise ValueError(f"columns_to_log is {columns!r}, expected a list of columns of batch")
        listed: Any = rewards.tolist() if isinstance(rewards, Tensor | np.ndarray) else rewards
        scores = inputs.score_vector(listed, count=len(listed) if isinstance(listed, Sequence) else 0, name="rewards")
        table = rollout_table(batch, columns, scores.tolist(), self.tokenizer)
        # Whatever ``stats`` hold: a rank that skipped this would leave the others waiting.
        stats = dict(stats) | score_statistics(scores, self.world)
        if self.world.rank == 0:
            for tracker in self.trackers:
                tracker.log(step, scalars(stats), {"game_log": table})

    def close(self, *, failed: bool = False) -> None:
        """Close the trackers' files; the next line opens them again and appends. See ``Trainer.close``."""
        trackers, self._trackers = self._trackers or [], None
        with ExitStack() as all_of_them:
            for tracker in trackers:
                self.goes_on_after = math.inf
                all_of_them.callback(tracker.close, failed=failed)
