"""Digests of prompts: the same for the same ones however they are kept, and another for any other."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Sequence, Value, concatenate_datasets

from ppo_runtime.rollout.digest import digest_of, prompt_digest, sampled_digest

ROWS = [[3 + (7 * row + token) % 50 for token in range(row % 4)] for row in range(300)]
TABLE = Dataset.from_dict({"input_ids": ROWS, "query": ["q"] * len(ROWS)})
KEPT: dict[str, Callable[[], Any]] = {
    "dictionaries": TABLE.to_list,
    "lists": lambda: ROWS,
    "tuples": lambda: tuple(map(tuple, ROWS)),
    "tensors": lambda: [{"input_ids": torch.tensor(row, dtype=torch.int64)} for row in ROWS],
    "arrays": lambda: [np.array(row, dtype=np.int32) for row in ROWS],
    "numbers of numpy": lambda: [[np.int64(token) for token in row] for row in ROWS],
    "tensors of a table": lambda: TABLE.with_format("torch"),
    "fewer columns": lambda: TABLE.remove_columns("query"),
    "longer numbers": lambda: TABLE.cast_column("input_ids", Sequence(Value("int64"))),
    "two tables": lambda: concatenate_datasets([TABLE.select(range(7)), TABLE.select(range(7, 300))]),
    "back in order": lambda: TABLE.select(range(299, -1, -1)).select(range(299, -1, -1)),
    "a part of more": lambda: concatenate_datasets([TABLE, TABLE]).select(range(300, 600)),
}


@pytest.mark.parametrize("kept", KEPT)
def test_the_same_prompts_have_the_same_digest(kept: str) -> None:
    assert prompt_digest(KEPT[kept]()) == prompt_digest(TABLE) is not None
    assert sampled_digest(KEPT[kept]()) == sampled_digest(TABLE)


def test_in_another_order_a_table_has_the_digest_of_its_rows() -> None:
    shuffled = TABLE.shuffle(seed=1)
    assert prompt_digest(shuffled) == prompt_digest(shuffled.to_list()) != prompt_digest(TABLE)
    some = shuffled.select(range(40))
    assert prompt_digest(some) == prompt_digest(some.to_list())


@pytest.mark.parametrize("row", [1, 2, 150, 299])
@pytest.mark.parametrize("table", [False, True])
def test_any_row_that_is_another_is_seen(row: int, table: bool) -> None:
    others = [*ROWS[:row], [*ROWS[row], 9], *ROWS[row + 1 :]]
    assert prompt_digest(Dataset.from_dict({"input_ids": others}) if table else others) != prompt_digest(ROWS)


def test_where_a_row_ends_is_seen() -> None:
    assert prompt_digest([[1, 2], [3]]) != prompt_digest([[1], [2, 3]])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ["a text"],
        [[0.5]],
        [[2**70]],
        [{"query": "q"}],
        [None],
        [5],
        [torch.ones(2, 2, dtype=torch.int64)],
        Dataset.from_dict({"query": ["q"]}),
        Dataset.from_dict({"input_ids": [[1], None]}),
        Dataset.from_dict({"input_ids": [[1, None]]}),
        Dataset.from_dict({"input_ids": [[0.5]]}),
        Dataset.from_dict({"input_ids": ["a text"]}),
        Dataset.from_dict({"input_ids": [[1]]}).with_transform(lambda batch: batch),
    ],
    ids=repr,
)
def test_what_is_no_list_of_prompts_has_none(rows: Any) -> None:
    assert prompt_digest(rows) is None


def test_a_dataloaders_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Any = ROWS
    loader = torch.utils.data.DataLoader(rows)
    first = digest_of(loader)
    monkeypatch.setattr("ppo_runtime.rollout.digest.prompt_digest", lambda _: pytest.fail("they are read again"))
    assert digest_of(loader) == first == prompt_digest(ROWS)
    assert digest_of(None) is None
