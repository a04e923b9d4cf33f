"""The prompts' dataloader."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from ppo_runtime.config import PPOConfig

# Columns the training loop and its logs read, besides the arguments of the model's forward.
TRAINER_COLUMNS = ("label", "query", "response")


def list_collator(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """A list per column: prompts differ in length, so nothing is stacked."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def prepare_dataloader(
    dataset: Any,
    data_collator: Callable[[list[dict[str, Any]]], Any] | None,
    *,
    config: PPOConfig,
    model: Any,
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
    if hasattr(dataset, "__len__") and config.drop_last and len(dataset) < config.batch_size:
        raise ValueError(
            f"dataset has {len(dataset)} rows, expected at least batch_size = {config.batch_size}; "
            "lower batch_size or set drop_last=False"
        )
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=config.drop_last,
        collate_fn=data_collator or list_collator,
        generator=torch.Generator().manual_seed(config.seed),
    )
