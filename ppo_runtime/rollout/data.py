"""The prompts' dataloader."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate

from ppo_runtime.common.wording import counted
from ppo_runtime.config import PPOConfig
from ppo_runtime.models.inner import transformers_model
from ppo_runtime.ranks.seeding import mixed
from ppo_runtime.ranks.world import World

# Columns the training loop and its logs read, besides the arguments of the model's forward.
TRAINER_COLUMNS = ("label", "query", "response")


def collate(rows: list[Any]) -> Any:
    """A list per column: prompts differ in length, so nothing is stacked. Rows without columns are: as torch does it.

    Raises:
        ValueError: tuples or tensors whose shapes differ; rows whose columns do.
    """
    if isinstance(rows[0], Mapping):
        names = list(dict.fromkeys(name for row in rows for name in row))
        for index, row in enumerate(rows):
            if missing := [name for name in names if name not in row]:
                raise ValueError(
                    f"row {index} of the batch has no {missing[0]!r}, expected the columns of the other rows; give "
                    "every row the same columns, or pass a data_collator"
                )
        return {name: [row[name] for row in rows] for name in names}
    try:
        return default_collate(rows)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"the dataset's rows are of type {type(rows[0]).__name__} and cannot be stacked ({error}); expected "
            "dictionaries, tensors of one shape, or tuples of these: pass a data_collator"
        ) from error


class PromptBatches(Sampler[list[int]]):
    """Indices of ``batch_size`` rows at a time, in an order drawn anew for every epoch from (seed, epoch).

    Ranks draw the same order and take turns in it; as many rows as they cannot share equally are left out, others in
    every epoch. Where they stand is the same two numbers on all of them, ``epoch`` and how many of its rows all ranks
    together have ``seen``; after ``load_state_dict`` the next iteration goes on there, whatever the number of ranks.
    Every other iteration begins a new epoch.
    """

    def __init__(self, rows: int, batch_size: int, *, drop_last: bool, seed: int, world: World) -> None:
        self.rows = rows
        self.world = world
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.seed = seed
        self.epoch = -1
        self.seen = 0
        self._go_on = False

    def __len__(self) -> int:
        """Batches in an epoch, the same number on every rank."""
        mine = self.rows // self.world.size
        return mine // self.batch_size if self.drop_last else -(-mine // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """The (rest of the) epoch's batches."""
        if not self._go_on:
            self.epoch, self.seen = self.epoch + 1, 0
        self._go_on = False
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(mixed(self.seed, self.epoch)))
        rest = order[self.seen :]
        mine = rest[self.world.rank : len(rest) - len(rest) % self.world.size : self.world.size]
        for batch in mine.split(self.batch_size):
            if len(batch) < self._least():
                return
            self.seen += len(batch) * self.world.size
            yield batch.tolist()

    def state_dict(self) -> dict[str, int]:
        """The place in the data, and the numbers without which it says nothing."""
        return {
            "epoch": self.epoch,
            "seen": self.seen,
            "rows": self.rows,
            "batch_size": self.batch_size,
            "ranks": self.world.size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there with the next iteration; from an epoch's end that is the next epoch.

        The order is that of the seed of then. No row of the epoch comes twice and none is left out, whatever the number
        of ranks and the batch size, but for those at its end that make no whole batch.
        """
        self.epoch, self.seed = state["epoch"], state.get("seed", self.seed)
        if "consumed" in state:  # batches of one rank, as it was counted once
            each = state.get("batch_size") or self.batch_size
            self.seen = state["consumed"] * each * state.get("ranks", self.world.size)
        else:
            self.seen = state["seen"]
        self._go_on = self.epoch >= 0 and (self.rows - self.seen) // self.world.size >= self._least()

    def _least(self) -> int:
        """Rows of one rank that make a batch."""
        return self.batch_size if self.drop_last else 1


def is_table(dataset: Any) -> TypeGuard[Any]:
    """Whether it is a ``datasets.Dataset``; whoever has one has imported that library, which takes 80 MiB."""
    table = getattr(sys.modules.get("datasets"), "Dataset", None)
    return isinstance(table, type) and isinstance(dataset, table)


def transforms(dataset: Any) -> bool:
    """Whether a ``datasets.Dataset`` makes its rows only when they are read (``set_transform``)."""
    return is_table(dataset) and dataset.format["type"] == "custom"


def prepare_dataloader(
    dataset: Any,
    data_collator: Callable[[list[dict[str, Any]]], Any] | None,
    *,
    config: PPOConfig,
    model: Any,
    world: World,
) -> DataLoader[Any]:
    """Batches of ``batch_size`` rows, reshuffled every epoch from the configuration's seed and shared among ranks.

    From a ``datasets.Dataset`` the columns that nobody reads are removed, unless ``remove_unused_columns`` is False.
    A stream (an IterableDataset) is taken in its own order: shuffle it yourself, and note that a resumed run begins it
    again.

    Raises:
        ValueError: no column is left; a rank has less than one batch while ``drop_last`` holds; several ranks and a
            stream.
    """
    _check_kinds(dataset, data_collator)
    # A transform may read columns that nothing else uses.
    if config.remove_unused_columns and getattr(dataset, "column_names", None) and not transforms(dataset):
        dataset = _without_unused_columns(dataset, model)
    # A generator of its own: without one, every epoch would begin with a draw from the global generator.
    options = {
        "collate_fn": data_collator or collate,
        "generator": torch.Generator().manual_seed(config.seed),
    }
    if isinstance(dataset, IterableDataset):
        if world.size > 1:
            raise ValueError(
                f"dataset is a {type(dataset).__name__} and there are {world.size} ranks, which would all read the "
                "same rows or end at different ones; load it into a datasets.Dataset"
            )
        return DataLoader(dataset, batch_size=config.batch_size, drop_last=config.drop_last, **options)
    if not len(dataset):
        raise ValueError("dataset has no rows, expected at least one prompt; was it filtered too far?")
    if config.drop_last and len(dataset) // world.size < config.batch_size:
        raise ValueError(
            f"dataset has {counted(len(dataset), 'row')} for {counted(world.size, 'rank')}, expected at least "
            f"batch_size = {config.batch_size} for each; lower batch_size or set drop_last=False"
        )
    batches = PromptBatches(len(dataset), config.batch_size, drop_last=config.drop_last, seed=config.seed, world=world)
    return DataLoader(dataset, batch_sampler=batches, **options)


def _check_kinds(dataset: Any, data_collator: Any) -> None:
    """Refuse what is no list of rows, with the way to make it one."""
    if data_collator is not None and not callable(data_collator):
        raise TypeError(
            f"data_collator is a {type(data_collator).__name__}, expected a function from a list of rows to a batch"
        )
    if isinstance(dataset, Mapping) and all(hasattr(split, "column_names") for split in dataset.values()):
        splits = ", ".join(map(repr, dataset))
        raise TypeError(
            f"dataset is a {type(dataset).__name__} of {splits}, expected one of them; pass dataset['train']"
        )
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    frame = hasattr(dataset, "iloc")
    if isinstance(dataset, str | bytes | Mapping) or frame or not (indexed or isinstance(dataset, IterableDataset)):
        named = "from_pandas" if frame else "from_dict" if isinstance(dataset, Mapping) else "from_list"
        how = "load_dataset" if isinstance(dataset, str | bytes) else f"Dataset.{named}"
        raise TypeError(
            f"dataset is a {type(dataset).__name__}, expected rows with 'input_ids': a datasets.Dataset, a torch "
            f"dataset or a list of dictionaries; make one with datasets.{how}(...)"
        )


def _without_unused_columns(dataset: Any, model: Any) -> Any:
    read = [*inspect.signature(transformers_model(model).forward).parameters, *TRAINER_COLUMNS]
    unused = [name for name in dataset.column_names if name not in read]
    if len(unused) == len(dataset.column_names):
        raise ValueError(
            f"dataset has the columns {', '.join(map(repr, unused))}, expected 'input_ids' among them (and 'query' for "
            "logs); tokenise it first, or set remove_unused_columns=False and pass a data_collator that does"
        )
    return dataset.remove_columns(unused)
