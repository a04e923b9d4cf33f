"""Generation: cutting, padding, prompts kept or not, and the modes of a model restored."""

import torch
from torch import Tensor

from ppo_runtime.rollout.engine import padded
from tests.runtime.support.tiny import EOS_ID, PAD_ID
from tests.runtime.support.trainers import make_trainer


def test_masks_come_from_lengths() -> None:
    rows = [torch.tensor([0, 5]), torch.tensor([0, 0, 7])]  # the padding id inside real prompts
    ids, mask = padded(rows, pad_token_id=0, side="left")
    assert ids.tolist() == [[0, 0, 5], [0, 0, 7]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    ids, mask = padded(rows, pad_token_id=0, side="right", width=4)
    assert ids.tolist() == [[0, 5, 0, 0], [0, 0, 7, 0]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


def test_an_eos_inside_the_prompt_does_not_cut_the_prompt() -> None:
    trainer = make_trainer()
    query = torch.tensor([5, EOS_ID, 6, EOS_ID])
    [whole] = trainer.generate([query], max_new_tokens=4, do_sample=False)
    assert whole[:4].tolist() == query.tolist()
    assert len(whole) > 4


def test_greedy_batches_equal_single_prompts() -> None:
    trainer = make_trainer()
    queries = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([10, 11]), torch.tensor([12])]
    together = trainer.generate(queries, batch_size=3, return_prompt=False, max_new_tokens=6, do_sample=False)
    for query, response in zip(queries, together, strict=True):
        alone: Tensor = trainer.generate(query, return_prompt=False, max_new_tokens=6, do_sample=False)
        assert alone.shape[0] == 1
        assert alone[0].tolist() == response.tolist()


def test_reference_responses_and_length_sampler() -> None:
    trainer = make_trainer()
    lengths = iter([2, 3, 2, 3])
    queries = [torch.tensor([5, 6]), torch.tensor([7])]
    mine, theirs = trainer.generate(
        queries, length_sampler=lambda: next(lengths), batch_size=1, generate_ref_response=True, do_sample=False
    )
    # The policy is still its own reference, so greedy responses agree.
    assert [row.tolist() for row in mine] == [row.tolist() for row in theirs]
    assert len(mine[0]) <= 2 + 2
    assert len(mine[1]) <= 1 + 3


def test_modes_are_restored() -> None:
    trainer = make_trainer()
    trainer.model.train()
    trainer.model.v_head.eval()
    trainer.generate(torch.tensor([5, 6]), max_new_tokens=2, do_sample=False)
    assert trainer.model.training
    assert not trainer.model.v_head.training


def test_padding_with_the_eos_token_is_legal() -> None:
    trainer = make_trainer()
    trainer.tokenizer.pad_token = trainer.tokenizer.eos_token
    queries = [torch.tensor([5, 6, EOS_ID]), torch.tensor([7])]
    with_eos = trainer.generate(queries, pad_token_id=EOS_ID, return_prompt=False, max_new_tokens=5, do_sample=False)
    with_pad = trainer.generate(queries, pad_token_id=PAD_ID, return_prompt=False, max_new_tokens=5, do_sample=False)
    assert [row.tolist() for row in with_eos] == [row.tolist() for row in with_pad]
