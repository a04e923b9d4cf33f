"""The dataloader: what it takes, what it drops, and the order of its rows."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset

from ppo_runtime.ranks.world import World
from ppo_runtime.rollout.data import PromptBatches, collate
from tests.runtime.support.tiny import tiny_tokenizer
from tests.runtime.support.trainers import make_trainer

ALONE = World(rank=0, size=1)


class Rows(TorchDataset):
    """A torch dataset of ragged prompts."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.full((1 + index % 3,), 10 + index), "index": index}


class Stream(IterableDataset):
    """The same rows, one after another."""

    def __init__(self, count: int) -> None:
        self.rows = Rows(count)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.rows[index] for index in range(self.rows.count))


def table(count: int, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [[10 + row] * (1 + row % 3) for row in range(count)], "query": ["q"] * count} | columns
    )


def epoch(trainer: Any) -> list[list[int]]:
    return [[int(ids[0]) - 10 for ids in batch["input_ids"]] for batch in trainer.dataloader]


@pytest.mark.parametrize("dataset", [table(14), Rows(14)], ids=["datasets", "torch"])
def test_an_epoch_is_a_permutation_and_the_next_is_another(dataset: Any) -> None:
    first, second = (epoch(trainer) for trainer in [make_trainer(dataset=dataset, drop_last=False)] * 2)
    assert [len(batch) for batch in first] == [6, 6, 2], "a shorter last batch is legal"
    for batches in (first, second):
        assert sorted(chain.from_iterable(batches)) == list(range(14))
    assert first != second
    assert epoch(make_trainer(dataset=dataset, drop_last=False)) == first, "the seed decides"
    assert epoch(make_trainer(dataset=dataset, drop_last=False, seed=1)) != first


def test_drop_last_leaves_out_other_rows_in_every_epoch() -> None:
    trainer = make_trainer(dataset=table(14))
    seen: set[int] = set()
    for _ in range(12):
        batches = epoch(trainer)
        assert [len(batch) for batch in batches] == [6, 6]
        seen |= set(chain.from_iterable(batches))
    assert seen == set(range(14))


def test_a_step_on_every_batch_of_a_ragged_epoch() -> None:
    trainer = make_trainer(dataset=Rows(8), drop_last=False, ppo_epochs=1)
    for batch in trainer.dataloader:
        responses = trainer.generate(batch["input_ids"], return_prompt=False, max_new_tokens=3, do_sample=False)
        stats = trainer.step(batch["input_ids"], responses, [torch.tensor(1.0)] * len(responses))
        assert len(stats["tokens/responses_dist"]) == len(responses)
    assert trainer.current_step == 2


def test_unused_columns_go_unless_they_are_wanted() -> None:
    columns: dict[str, Any] = {"label": [1] * 6, "noise": [0] * 6}
    (batch,) = make_trainer(dataset=table(6, **columns)).dataloader
    assert set(batch) == {"input_ids", "query", "label"}
    (batch,) = make_trainer(dataset=table(6, **columns), remove_unused_columns=False).dataloader
    assert set(batch) == {"input_ids", "query", "label", "noise"}


def test_a_dataset_that_would_lose_every_column_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset has the columns 'text', expected 'input_ids' among them"):
        make_trainer(dataset=Dataset.from_dict({"text": ["a"] * 6}))


def test_too_few_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"dataset has 5 rows for 1 rank, expected at least batch_size = 6"):
        make_trainer(dataset=table(5))
    assert len(make_trainer(dataset=table(5), drop_last=False).dataloader) == 1


def test_a_collator_of_ones_own() -> None:
    trainer = make_trainer()
    loader = trainer.prepare_dataloader(table(6), lambda rows: {"count": len(rows)})
    assert list(loader) == [{"count": 6}]


def test_a_padding_collator_of_transformers() -> None:
    from transformers import DataCollatorWithPadding

    (batch,) = make_trainer().prepare_dataloader(
        table(6).remove_columns("query"), DataCollatorWithPadding(tiny_tokenizer())
    )
    assert batch["input_ids"].shape == (6, 3)


@pytest.mark.parametrize("stream", ["torch", "datasets"])
def test_a_stream_keeps_its_order(stream: str) -> None:
    dataset = Stream(14) if stream == "torch" else table(14).to_iterable_dataset()
    trainer = make_trainer(dataset=dataset)
    assert epoch(trainer) == epoch(trainer) == [list(range(6)), list(range(6, 12))]
    assert epoch(make_trainer(dataset=dataset, drop_last=False))[-1] == [12, 13]


def test_a_stream_is_not_shared_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    trainer.world = World(rank=0, size=2)
    with pytest.raises(ValueError, match="dataset is a Stream and there are 2 ranks"):
        trainer.prepare_dataloader(Stream(24))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("rows", [12, 13, 17])
def test_ranks_share_an_epoch_in_equally_many_equal_batches(rows: int, drop_last: bool) -> None:
    samplers = [
        PromptBatches(rows, 3, drop_last=drop_last, seed=0, world=World(rank=rank, size=2)) for rank in range(2)
    ]
    for _ in range(3):
        one, other = (list(sampler) for sampler in samplers)
        assert list(map(len, one)) == list(map(len, other))
        assert len(one) == len(samplers[0])
        indices = list(chain.from_iterable(one + other))
        assert len(set(indices)) == len(indices)
        assert len(indices) >= (rows - 5 if drop_last else rows - 1)


def test_the_place_in_an_epoch_can_be_kept() -> None:
    sampler = PromptBatches(10, 2, drop_last=True, seed=3, world=ALONE)
    list(sampler)
    batches = iter(sampler)
    head = [next(batches), next(batches)]
    again = PromptBatches(10, 2, drop_last=True, seed=3, world=ALONE)
    again.load_state_dict(sampler.state_dict())
    tail = list(again)
    whole = PromptBatches(10, 2, drop_last=True, seed=3, world=ALONE)
    list(whole)
    assert head + tail == list(whole)


def test_a_place_at_the_end_of_an_epoch_goes_on_with_the_next() -> None:
    sampler, again = (PromptBatches(6, 2, drop_last=True, seed=3, world=ALONE) for _ in range(2))
    list(sampler)
    again.load_state_dict(sampler.state_dict())
    assert list(again) == list(sampler)


def test_rows_without_columns_are_stacked_as_torch_does() -> None:
    """A dataset of tuples or of bare tensors, as in many old scripts, with no data_collator."""
    rows = [(torch.tensor([1, 2]), torch.tensor([3])), (torch.tensor([4, 5]), torch.tensor([6]))]
    for dataset in (rows, [list(row) for row in rows]):
        trainer = make_trainer(dataset=dataset, batch_size=2, mini_batch_size=1)
        ((queries, responses),) = trainer.dataloader
        assert sorted(queries.tolist()) == [[1, 2], [4, 5]]
        assert sorted(responses.tolist()) == [[3], [6]]
        stats = trainer.step(list(queries), list(responses), [torch.tensor(1.0), torch.tensor(0.0)])
        assert math.isfinite(stats["ppo/loss/total"])
    (stacked,) = make_trainer(dataset=[row[0] for row in rows], batch_size=2).dataloader
    assert stacked.shape == (2, 2)
    ragged = make_trainer(dataset=[torch.ones(1), torch.ones(2)], batch_size=2)
    with pytest.raises(ValueError, match=r"rows are of type Tensor and cannot be stacked .*pass a data_collator"):
        next(iter(ragged.dataloader))


def test_lists_per_column() -> None:
    assert collate([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]) == {"a": [1, 2], "b": ["x", "y"]}
