"""Response masks: tokens that were not the policy's choice, such as a tool's output, in the middle of a response."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_runtime.learning import update
from ppo_runtime.learning.forward import evaluate, lay_out, score_rollout
from ppo_runtime.rollout.engine import padded
from tests.runtime.support.tiny import EOS_ID, PAD_ID, tiny_model
from tests.runtime.support.trainers import make_trainer

QUERIES = [torch.tensor([5, 6, 7, 8]), torch.tensor([9]), torch.tensor([11, PAD_ID])]
RESPONSES = [
    torch.tensor([20, 21, 22, 23, 24]),
    torch.tensor([30, PAD_ID, EOS_ID, 33]),
    torch.tensor([40, 41, 42, 43, 44, EOS_ID]),
]
MASKS = [torch.tensor([1, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 0]), torch.tensor([1, 1, 1, 1, 1, 1])]
SCORES = [torch.tensor(1.0), torch.tensor(-1.0), torch.tensor(0.5)]
families = pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])


def trainer_of(family: str, **settings: Any) -> Any:
    return make_trainer(
        family, ref_model=tiny_model(family, seed=1), batch_size=3, mini_batch_size=1, ppo_epochs=1, **settings
    )


def rows_of(model: Any, masks: list[Tensor] | None) -> Any:
    start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    kept = None if masks is None else [mask.bool() for mask in masks]
    return lay_out(
        QUERIES, RESPONSES, kept, pad_token_id=PAD_ID, decoder_start_token_id=start, device=torch.device("cpu")
    )


@families
def test_kept_tokens_are_seen_as_without_a_mask(family: str) -> None:
    """A hole is context like any other: log-probabilities and values of the kept tokens do not change."""
    model = trainer_of(family).model.eval()
    with torch.no_grad():
        masked, whole = evaluate(model, rows_of(model, MASKS)), evaluate(model, rows_of(model, None))
    mask = rows_of(model, MASKS).mask
    for with_holes, without in zip(masked, whole, strict=True):
        assert with_holes is not None
        assert without is not None
        time = with_holes.shape[1]
        torch.testing.assert_close(with_holes[mask], without[:, :time][mask[:, :time]], rtol=1e-5, atol=1e-6)
        assert not with_holes[~mask].any()


@families
def test_advantages_are_those_of_the_deleted_sequence(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards, advantages and returns of a response with holes equal those of the kept tokens alone."""
    trainer = trainer_of(family, lam=0.7, gamma=0.9)
    seen: list[update.Targets] = []
    minibatch = update.minibatch_losses

    def spy(now: Any, part: Any, targets: update.Targets, *args: Any) -> Any:
        seen.append(targets)
        return minibatch(now, part, targets, *args)

    monkeypatch.setattr(update, "minibatch_losses", spy)
    with trainer._reference() as reference:
        scored, _ = score_rollout(
            trainer.model, lambda: trainer._reference(), rows_of(trainer.model, MASKS), kl_penalty="kl"
        )
        assert reference is not None
    stats = trainer.step(QUERIES, RESPONSES, SCORES, response_masks=MASKS)
    targets, mask = seen[0], rows_of(trainer.model, MASKS).mask
    advantages: list[float] = []
    for row, score in enumerate(SCORES):
        kept = mask[row]
        values, kl = scored.values[row][kept].tolist(), scored.kl[row][kept].tolist()
        rewards = [-0.2 * nats for nats in kl]
        rewards[-1] += float(score)
        delta = [r + 0.9 * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0], strict=True)]
        found = [sum(0.63 ** (s - t) * delta[s] for s in range(t, len(delta))) for t in range(len(delta))]
        expected = torch.tensor([a + v for a, v in zip(found, values, strict=True)])
        torch.testing.assert_close(targets.returns[row][kept], expected, rtol=1e-5, atol=1e-5)
        advantages += found
    whitened = (torch.tensor(advantages) - torch.tensor(advantages).mean()) / torch.tensor(advantages).std()
    torch.testing.assert_close(targets.advantages[mask], whitened, rtol=1e-4, atol=1e-4)
    assert len(stats["objective/logprobs"]) == sum(int(m.sum()) for m in MASKS)
    assert stats["objective/kl"] == pytest.approx(float(scored.kl.sum()) / 3, rel=1e-5)


@families
def test_no_gradient_comes_from_masked_tokens(family: str) -> None:
    """The gradient of the losses by the logits that predict a masked token is exactly 0."""
    model = trainer_of(family).model.eval()
    rows = rows_of(model, MASKS)
    states: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    inner = model.pretrained_model
    trunk = inner.get_decoder() if family == "t5" else inner.base_model
    handle = trunk.register_forward_hook(keep)
    result = evaluate(model, rows)
    handle.remove()
    assert result.values is not None
    (result.logprobs.sum() + result.entropy.sum() + result.values.sum()).backward()
    gradient = states[0].grad
    assert gradient is not None
    used = torch.zeros(gradient.shape[:2], dtype=torch.bool)
    for row in range(3):
        used[row, rows.predictors[row][rows.mask[row]]] = True
    assert not gradient[~used].any()
    assert gradient[used].any(-1).all()


@families
def test_masked_tokens_behind_the_last_kept_one_change_nothing(family: str) -> None:
    """What a tool says after the policy's last token has no influence on the weights."""
    masks = [torch.tensor([1, 1, 0, 0, 0]), torch.tensor([1, 1, 1, 0]), torch.tensor([1, 1, 1, 1, 0, 0])]
    others = [torch.where(mask.bool(), response, 50) for mask, response in zip(masks, RESPONSES, strict=True)]
    trainers = [trainer_of(family), trainer_of(family)]
    for trainer, responses in zip(trainers, (RESPONSES, others), strict=True):
        trainer.step(QUERIES, responses, SCORES, response_masks=masks)
    for one, other in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_on_either_side_gives_the_same(family: str) -> None:
    """``batched_forward_pass`` of a batch padded on the left or on the right, holes included."""
    trainer = trainer_of(family)
    texts = [torch.cat(pair) for pair in zip(QUERIES, RESPONSES, strict=True)]
    ids, attention = padded(texts, PAD_ID, side="left")
    found: list[list[Tensor]] = []
    for inputs in (
        {"input_ids": ids, "attention_mask": attention},
        trainer.prepare_model_inputs(QUERIES, RESPONSES),
    ):
        with torch.no_grad():
            logprobs, _, values, masks = trainer.batched_forward_pass(
                trainer.model, QUERIES, RESPONSES, inputs, response_masks=MASKS
            )
        kept = masks.bool()
        found.append([logprobs[kept], values[kept], inputs["input_ids"][:, 1:][kept]])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    assert len(found[0][0]) == sum(int(mask.sum()) for mask in MASKS)


def test_a_row_without_a_kept_token_trains_nothing_and_breaks_nothing() -> None:
    masks = [torch.zeros(5), torch.ones(4), torch.ones(6)]
    trainer = trainer_of("llama")
    stats = trainer.step(QUERIES, RESPONSES, SCORES, response_masks=masks)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in stats.values())
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
