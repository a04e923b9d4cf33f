"""The prompts' dataloader."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from ppo_runtime.config import PPOConfig
from ppo_runtime.distributed import World

# Columns the training loop and its logs read, besides the arguments of the model's forward.
TRAINER_COLUMNS = ("label", "query", "response")


def list_collator(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """A list per column: prompts differ in length, so nothing is stacked."""
    return {name: [row[name] for row in rows] for name in rows[0]}


class PromptBatches(Sampler[list[int]]):
    """Indices of ``batch_size`` rows at a time, in an order drawn anew for every epoch from (seed, epoch).

    Where it stands is two numbers, ``epoch`` and ``consumed``; after ``load_state_dict`` the next iteration goes on
    there. Every other iteration begins a new epoch.
    """

    def __init__(self, rows: int, batch_size: int, *, drop_last: bool, seed: int) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.seed = seed
        self.epoch = -1
        self.consumed = 0
        self._go_on = False

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """The (rest of the) epoch's batches."""
        if not self._go_on:
            self.epoch, self.consumed = self.epoch + 1, 0
        self._go_on = False
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(_mixed(self.seed, self.epoch)))
        batches = order.split(self.batch_size)[: len(self)]
        for batch in batches[self.consumed :]:
            self.consumed += 1
            yield batch.tolist()

    def state_dict(self) -> dict[str, int]:
        """The place in the data."""
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there with the next iteration."""
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self._go_on = self.epoch >= 0


def _mixed(seed: int, epoch: int) -> int:
    """One seed of two numbers, so that seed 0's second epoch is not seed 1's first."""
    return (seed * 1_000_003 + epoch) % 2**63


def prepare_dataloader(
    dataset: Any,
    data_collator: Callable[[list[dict[str, Any]]], Any] | None,
    *,
    config: PPOConfig,
    model: Any,
    world: World,
) -> DataLoader[Any]:
    """Batches of ``batch_size`` rows, reshuffled every epoch from the configuration's seed.

    From a ``datasets.Dataset`` the columns that nobody reads are removed, unless ``remove_unused_columns`` is False.

    Raises:
        ValueError: the dataset is shorter than one batch while ``drop_last`` holds.
    """
    if config.remove_unused_columns and hasattr(dataset, "column_names"):
        signature = inspect.signature(model.pretrained_model.forward).parameters
        unused = [name for name in dataset.column_names if name not in signature and name not in TRAINER_COLUMNS]
        dataset = dataset.remove_columns(unused)
    if config.drop_last and len(dataset) < config.batch_size:
        raise ValueError(
            f"dataset has {len(dataset)} rows, expected at least batch_size = {config.batch_size}; "
            "lower batch_size or set drop_last=False"
        )
    batches = PromptBatches(len(dataset), config.batch_size, drop_last=config.drop_last, seed=config.seed)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=data_collator or list_collator,
        # A generator of its own: without one, every epoch would begin with a draw from the global generator.
        generator=torch.Generator().manual_seed(config.seed),
    )
