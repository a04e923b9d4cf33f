"""The benchmark of collectives counts rightly; nothing here is timed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks import collectives
from tests.benchmarks.step.workload import EPOCHS
from tests.runtime.support.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [([], 0), ([(1, 2), (4, 6)], 3), ([(1, 5), (2, 3)], 4), ([(3, 6), (1, 4)], 5), ([(1, 2), (1, 2)], 1)],
    ids=["none", "apart", "within", "overlapping", "alike"],
)
def test_a_moment_counts_once(spans: list[Any], seconds: float) -> None:
    assert collectives.seconds_in(spans) == seconds


def test_gradients_are_sent_once_in_every_update(tmp_path: Any) -> None:
    tiny_model("llama", tie_word_embeddings=True, max_position_embeddings=96).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ranks = collectives.run(str(tmp_path), "W1", "ddp", ranks=2, steps=1, threads=1)
    updates = EPOCHS * 2
    for rank in ranks:
        # Beside them one number that no pass reads, and what a bucket is filled up with.
        assert rank["gradient_mib"] == pytest.approx(rank["trainable_mib"], rel=0.02)
        assert rank["calls"]["gloo:all_reduce"] >= updates
        assert 0 < rank["collectives"][0] < rank["seconds"][0]
    assert "ddp" in collectives.table({"ddp": ranks})
