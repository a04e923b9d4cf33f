"""TRL's piecewise methods and array helpers, and encoder-decoders from end to end."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppo_core.averages import Average
from ppo_runtime import (
    AutoModelForSeq2SeqLMWithValueHead,
    LengthSampler,
    clip_by_value,
    convert_to_scalar,
    entropy_from_logits,
    flatten_dict,
    get_global_statistics,
    logprobs_from_logits,
    masked_mean,
    masked_var,
    masked_whiten,
    respond_to_batch,
    set_seed,
    stack_dicts,
    stats_to_np,
    whiten,
)
from ppo_runtime.compat.recording import training_parts
from tests.runtime.support.tiny import PAD_ID, tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import make_batch, make_trainer

NAN = float("nan")


def assert_same_weights(one: Any, other: Any, **tolerance: float) -> None:
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def step_in_pieces(trainer: Any, queries: Any, responses: Any, scores: Any, masks: Any = None) -> dict[str, Any]:
    """What TRL's `step` does with its own methods."""
    size = trainer.config.mini_batch_size
    full = trainer.config.kl_penalty == "full"
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, logits, values, mask = trainer.batched_forward_pass(
            trainer.model, queries, responses, inputs, return_logits=full, response_masks=masks
        )
        with trainer.optional_peft_ctx():
            reference = trainer.model if trainer.ref_model is None else trainer.ref_model
            ref_logprobs, ref_logits, _, _ = trainer.batched_forward_pass(
                reference, queries, responses, inputs, return_logits=full, response_masks=masks
            )
        pair = (logits.log_softmax(-1), ref_logits.log_softmax(-1)) if full else (logprobs, ref_logprobs)
        rewards, non_score, kls = trainer.compute_rewards(scores, *pair, mask, return_kls=True)
        values, advantages, returns = trainer.compute_advantages(values, rewards, mask)
    all_stats = []
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        part_inputs = {name: value[part] for name, value in inputs.items()}
        new_logprobs, new_logits, vpreds, _ = trainer.batched_forward_pass(
            trainer.model,
            queries[part],
            responses[part],
            part_inputs,
            return_logits=True,
            response_masks=None if masks is None else masks[part],
        )
        all_stats.append(
            trainer.train_minibatch(
                logprobs[part],
                values[part],
                new_logprobs,
                new_logits,
                vpreds,
                mask[part],
                advantages[part],
                returns[part],
            )
        )
    return trainer.record_step_stats(
        trainer.kl_ctl.value,
        queries=queries,
        responses=responses,
        scores=scores,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        non_score_reward=non_score,
        masks=mask,
        kls=kls,
        train_stats=stack_dicts(all_stats),
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("gpt2", {"kl_penalty": "full", "max_grad_norm": 0.05}),
        ("llama", {"kl_penalty": "abs", "mini_batch_size": 2, "gradient_accumulation_steps": 3}),
        ("llama", {"kl_penalty": "mse", "whiten_rewards": True}),
        ("t5", {"mini_batch_size": 3, "gradient_accumulation_steps": 2}),
    ],
)
def test_the_pieces_make_a_step(family: str, settings: dict[str, Any]) -> None:
    """One update by TRL's methods is one by `step`: weights, and every statistic that both report."""
    settings = {"mini_batch_size": 6, "ppo_epochs": 1, "learning_rate": 1e-2} | settings
    reference = tiny_model(family, seed=1)
    whole, parts = (make_trainer(family, ref_model=copy.deepcopy(reference), **settings) for _ in range(2))
    batch = make_batch()
    masks = [torch.arange(len(response)) % 3 != 1 for response in batch[1]]
    expected, found = whole.step(*batch, masks), step_in_pieces(parts, *batch, masks)
    # Adam divides by the root of the squared gradient, so that rounding grows where a gradient is nearly 0.
    assert_same_weights(whole, parts, atol=2e-4, rtol=1e-3)
    split_variances = {"ppo/returns/var", "ppo/val/var", "ppo/val/var_explained", "ppo/policy/advantages_mean"}
    several = parts.config.mini_batch_size < 6
    for name in set(found) - (split_variances if several else {"ppo/policy/advantages_mean"}):
        if name != "ppo/policy/advantages" or not several:
            np.testing.assert_allclose(found[name], expected[name], atol=2e-5, rtol=1e-4, err_msg=name)
    assert {name for name in expected if not name.startswith("time/")} - set(found) == {
        "ppo/learning_rate",
        "ppo/policy/epochs",
        "ppo/policy/first_minibatch_ratio_deviation",
        "ppo/policy/grad_norm",
        "ppo/policy/skipped_updates",
    }


def test_the_pieces_make_a_step_with_an_adapter() -> None:
    from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    def trainer() -> PPOTrainer:
        set_seed(0)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=tiny_lora("llama"))
        config = PPOConfig(batch_size=6, mini_batch_size=6, ppo_epochs=1, learning_rate=1e-2, accel="eager")
        return PPOTrainer(config, model, None, tiny_tokenizer())

    whole, parts = trainer(), trainer()
    whole.step(*make_batch())
    stats = step_in_pieces(parts, *make_batch())
    assert stats["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert_same_weights(whole, parts, atol=2e-4, rtol=1e-3)


def test_inputs_padded_on_the_left_say_the_same() -> None:
    trainer = make_trainer("gpt2")
    queries, responses, _ = make_batch()
    right = trainer.prepare_model_inputs(queries, responses)
    lengths = right["attention_mask"].sum(-1)
    left = {
        name: torch.stack([row.roll(len(row) - int(n)) for row, n in zip(tensor, lengths, strict=True)])
        for name, tensor in right.items()
    }
    with torch.no_grad():
        one, other = (
            trainer.batched_forward_pass(trainer.model, queries, responses, inputs) for inputs in (right, left)
        )
    for a, b in ((one[0], other[0]), (one[2], other[2])):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a[one[3].bool()], b[other[3].bool()])
    assert one[1] is None
    assert one[3].sum() == sum(map(len, responses))
    assert one[0].shape == (6, right["input_ids"].shape[1] - 1)


def test_logits_are_the_models_own() -> None:
    trainer = make_trainer("gpt2")
    queries, responses, _ = make_batch()
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, logits, values, mask = trainer.batched_forward_pass(
            trainer.model, queries, responses, inputs, return_logits=True
        )
        expected, _, expected_values = trainer.model(**inputs)
    assert logits is not None
    assert values is not None
    real = inputs["attention_mask"][:, :-1].bool()
    torch.testing.assert_close(logits[real], expected[:, :-1][real])
    kept = mask.bool()
    torch.testing.assert_close(values[kept], expected_values[:, :-1][kept])
    chosen = logprobs_from_logits(expected[:, :-1], inputs["input_ids"][:, 1:])
    torch.testing.assert_close(logprobs[kept], chosen[kept])


def test_model_inputs_of_another_batch_are_refused() -> None:
    trainer = make_trainer()
    queries, responses, _ = make_batch()
    inputs = trainer.prepare_model_inputs(queries, responses)
    with pytest.raises(ValueError, match=r"model_inputs\['attention_mask'\]\[0\] marks .* tokens, expected"):
        trainer.batched_forward_pass(trainer.model, queries, [response[:1] for response in responses[::-1]], inputs)


def _targets(trainer: Any, seed: int = 0) -> tuple[Any, ...]:
    queries, responses, _ = make_batch(seed=seed)
    inputs = trainer.prepare_model_inputs(queries, responses)
    logprobs, logits, vpreds, mask = trainer.batched_forward_pass(
        trainer.model, queries, responses, inputs, return_logits=True
    )
    noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    return logprobs.detach(), vpreds.detach(), logits, vpreds, logprobs, mask, noise, noise


def test_loss_is_the_mean_over_kept_tokens_with_the_value_weighted() -> None:
    trainer = make_trainer(vf_coef=0.25)
    old, values, logits, vpreds, logprobs, mask, advantages, returns = _targets(trainer)
    policy, value, stats = trainer.loss(old, values, logits, vpreds, logprobs, mask, advantages, returns)
    kept = mask.bool()
    assert policy.item() == pytest.approx(-advantages[kept].mean().item(), abs=1e-6)
    errors = (values[kept] - returns[kept]).square()
    assert value.item() == pytest.approx(0.25 * 0.5 * errors.mean().item(), rel=1e-5)
    assert stats["loss/total"].item() == pytest.approx((policy + value).item(), rel=1e-5)
    assert stats["policy/entropy"].item() == pytest.approx(entropy_from_logits(logits)[kept].mean().item(), rel=1e-5)
    assert policy.requires_grad
    assert value.requires_grad
    without = trainer.loss(old, values, None, vpreds, logprobs, mask, advantages, returns)[2]
    assert set(stats) - set(without) == {"policy/entropy"}


def test_a_minibatch_that_went_too_far_changes_nothing() -> None:
    trainer = make_trainer(ratio_threshold=1.5)
    old, values, logits, vpreds, logprobs, mask, advantages, returns = _targets(trainer)
    before = copy.deepcopy(trainer.model.state_dict())
    stats = trainer.train_minibatch(old - 5.0, values, logprobs, logits, vpreds, mask, advantages, returns)
    assert stats["policy/ratio"] > 100
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    assert not trainer.optimizer.state


def test_accumulation_begins_anew_after_a_step() -> None:
    """A half-accumulated update does not leak into the ones after a whole `step`."""
    trainer = make_trainer(mini_batch_size=3, gradient_accumulation_steps=2)
    old, values, logits, vpreds, logprobs, mask, advantages, returns = _targets(trainer)
    trainer.train_minibatch(old, values, logprobs, logits, vpreds, mask, advantages, returns)
    assert not trainer.optimizer.state
    trainer.step(*make_batch())
    weights = copy.deepcopy(trainer.model.state_dict())
    old, values, logits, vpreds, logprobs, mask, advantages, returns = _targets(trainer)
    trainer.train_minibatch(old, values, logprobs, logits, vpreds, mask, advantages, returns)
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("penalty", ["kl", "abs", "mse", "full"])
def test_the_penalty_of_every_token_by_its_old_name(penalty: str) -> None:
    trainer = make_trainer(kl_penalty=penalty)
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(2, 3, 5, generator=generator).log_softmax(-1) for _ in range(2))
    if penalty == "full":
        expected = (mine.exp() * (mine - theirs)).sum(-1)
    else:
        mine, theirs = mine[..., 0], theirs[..., 0]
        expected = {"kl": mine - theirs, "abs": (mine - theirs).abs(), "mse": 0.5 * (mine - theirs) ** 2}[penalty]
    torch.testing.assert_close(trainer._kl_penalty(mine, theirs), expected)


def test_the_checks_of_a_step_by_their_old_name() -> None:
    trainer = make_trainer()
    queries, responses, scores = make_batch()
    found = trainer._step_safety_checker(6, queries, responses, scores)
    assert [row.tolist() for row in found[0]] == [row.tolist() for row in queries]
    assert [row.tolist() for row in found[1]] == [row.tolist() for row in responses]
    assert [float(score) for score in found[2]] == pytest.approx([float(score) for score in scores])
    assert found[3] is None
    with pytest.raises(ValueError, match="queries has 6 rows, expected batch_size = 5"):
        trainer._step_safety_checker(5, queries, responses, scores)
    with pytest.raises(ValueError, match=r"scores\[0\] has shape \(1, 1\), expected a 0-d or 1-element tensor"):
        trainer.step(queries, responses, [score.reshape(1, 1) for score in scores])


def test_gradients_are_zero_after_a_step() -> None:
    """Where something trains; scripts look whether there is a gradient at all."""
    trainer = make_trainer(num_shared_layers=1)
    trainer.step(*make_batch())
    for name, parameter in trainer.model.named_parameters():
        assert (parameter.grad is None) != parameter.requires_grad, name
        assert parameter.grad is None or not parameter.grad.any(), name


def test_full_kl_needs_the_estimates_for_its_statistics() -> None:
    trainer = make_trainer(kl_penalty="full")
    with pytest.raises(ValueError, match=r"kls is missing, which kl_penalty='full' needs"):
        trainer.record_step_stats(0.1, masks=torch.ones(1, 2), logprobs=torch.zeros(1, 2))


# --- statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", [None, object()])
def test_global_statistics_sum_under_the_mask(accelerator: Any) -> None:
    xs = torch.tensor([[1.0, 3.0, 1e6], [NAN, 5.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    for found in (get_global_statistics(accelerator, xs, mask), get_global_statistics(xs, mask)):
        assert [x.item() for x in found] == [4.0, 5.0, 4]
    mean, variance, count = get_global_statistics(xs=torch.tensor([2, 4]))
    assert (mean.item(), variance.item(), count.item()) == (3.0, 1.0, 2)
    with pytest.raises(TypeError, match=r"xs is a (NoneType|object), expected a torch.Tensor"):
        get_global_statistics(accelerator)
    with pytest.raises(TypeError, match=r"xs is a ndarray, expected a torch.Tensor"):
        get_global_statistics(np.ones(3))


def test_gathering_in_a_world_of_one() -> None:
    stats = {
        "a": torch.tensor(1.0),
        "b": torch.arange(3.0),
        "c": 4.0,
        "d": Average(torch.tensor(6.0), torch.tensor(4.0)),
    }
    found = make_trainer().gather_stats(stats)
    assert found["d"] == 1.5
    assert all(found[name] is stats[name] for name in "abc")


# --- arrays --------------------------------------------------------------------------------------------------


def test_masked_averages_take_integer_masks_and_are_always_defined() -> None:
    x = torch.tensor([[1.0, 2.0, NAN], [5.0, NAN, NAN]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_mean(x, mask).item() == pytest.approx(8 / 3)
    assert masked_mean(x, mask, axis=1).tolist() == [1.5, 5.0]
    assert masked_var(x, mask).item() == pytest.approx(np.var([1, 2, 5], ddof=1))
    assert masked_var(x, mask, unbiased=False).item() == pytest.approx(np.var([1, 2, 5]))
    one = torch.tensor([[1, 0, 0], [0, 0, 0]])
    assert masked_var(x, one).item() == 0.0
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0.0


def test_whitening() -> None:
    x = torch.tensor([1.2, 1.4, 1.6, 1.8, 2.0])
    expected = (x - x.mean()) / x.std()
    torch.testing.assert_close(whiten(x), expected)
    torch.testing.assert_close(whiten(x, shift_mean=False), expected + x.mean())
    padded, mask = torch.cat((x, torch.tensor([NAN]))), torch.tensor([1, 1, 1, 1, 1, 0])
    torch.testing.assert_close(masked_whiten(padded, mask), torch.cat((expected, torch.zeros(1))))


def test_logprobs_and_entropy() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2], [3, 4, 5]])
    everything = logits.log_softmax(-1)
    torch.testing.assert_close(logprobs_from_logits(logits, labels), everything.gather(-1, labels[..., None])[..., 0])
    torch.testing.assert_close(logprobs_from_logits(logits, None, gather=False), everything)
    torch.testing.assert_close(entropy_from_logits(logits), -(everything.exp() * everything).sum(-1))
    with pytest.raises(ValueError, match="labels is None"):
        logprobs_from_logits(logits, None)


def test_clipping_by_tensors_and_numbers() -> None:
    x = torch.tensor([-2.0, 0.5, 3.0])
    assert clip_by_value(x, -1.0, 1.0).tolist() == [-1.0, 0.5, 1.0]
    assert clip_by_value(x, x - 1, torch.tensor([-5.0, 0.0, 9.0])).tolist() == [-3.0, 0.0, 3.0]


def test_dictionaries() -> None:
    assert flatten_dict({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert flatten_dict({"a": {"b": 1}}, sep=".") == {"a.b": 1}
    with pytest.raises(ValueError, match="two entries for 'a/b'"):
        flatten_dict({"a": {"b": 1}, "a/b": 2})
    stacked = stack_dicts([{"x": torch.tensor(1.0), "y": torch.ones(1)}, {"x": torch.tensor(2.0), "y": torch.ones(3)}])
    assert stacked["x"].tolist() == [[1.0], [2.0]]
    assert stacked["y"].isnan().sum() == 2
    assert stacked["y"].nanmean() == 1.0, "nothing that was filled in counts"
    with pytest.raises(ValueError, match=r"stats_dicts\[1\] differs from the first in \['y'\]"):
        stack_dicts([{"x": 1.0}, {"x": 1.0, "y": 2.0}])
    with pytest.raises(ValueError, match="stats_dicts is empty"):
        stack_dicts([])


def test_what_stacking_has_filled_up_is_in_no_distribution() -> None:
    ragged = stack_dicts([{"policy/advantages": torch.tensor(x)} for x in ([1.0, 2.0], [3.0])])
    _, distributions = training_parts(ragged)
    assert distributions["ppo/policy/advantages"].tolist() == [1.0, 2.0, 3.0]


def test_conversions() -> None:
    stats = {"a": torch.tensor(1.5, dtype=torch.bfloat16), "b": torch.ones(2), "c": 3, "d": "text", "e": np.float64(2)}
    arrays = stats_to_np(stats)
    assert (arrays["a"], arrays["c"], arrays["d"], arrays["e"]) == (1.5, 3.0, "text", 2.0)
    assert isinstance(arrays["b"], np.ndarray)
    assert convert_to_scalar(stats | {"f": torch.ones(1)}) == {"a": 1.5, "c": 3.0, "e": 2.0, "f": 1.0}


DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype) and not str(value).startswith("torch.q")}
    # Sub-byte numbers, which torch itself can neither print nor convert, and what it warns of as an experiment.
    - {
        value
        for name, value in vars(torch).items()
        if name.startswith(("bits", "float4")) or name[:-1] in ("int", "uint")
    }
    - {torch.complex32},
    key=str,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_conversions_of_every_kind_of_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """What numpy does not know becomes float32; what has an imaginary part is no single number to be logged."""
    tensor = torch.ones(shape).to(dtype)
    tensor = tensor.conj() if dtype.is_complex else tensor
    found = stats_to_np({"x": tensor})["x"]
    np.testing.assert_array_equal(found, np.ones(shape))
    assert isinstance(found, float) == (shape == () and not dtype.is_complex)
    expected = {} if dtype.is_complex or shape == (2,) else {"x": 1.0}
    assert convert_to_scalar({"x": tensor}) == expected
    if dtype.itemsize > 1 and dtype != torch.bfloat16:
        assert convert_to_scalar({"x": found}) == expected, "the same of numpy's"


def test_conversion_of_a_view_that_torch_has_yet_to_negate() -> None:
    found = stats_to_np({"x": torch.tensor([1 + 2j]).conj().imag})["x"]
    np.testing.assert_array_equal(found, [-2.0])


@pytest.mark.parametrize(
    "value", [1j, np.complex64(1j), np.array("text"), np.str_("text"), np.datetime64(3, "s"), None]
)
def test_what_is_no_real_number_stays(value: Any) -> None:
    assert stats_to_np({"x": value})["x"] is value
    assert convert_to_scalar({"x": value}) == {}


def test_length_sampler() -> None:
    sampler = LengthSampler(3, 6)
    set_seed(0)
    drawn = [sampler() for _ in range(60)]
    assert set(drawn) == {3, 4, 5}
    set_seed(0)
    assert drawn == [sampler() for _ in range(60)]
    with pytest.raises(ValueError, match="max_value is 3, expected more than min_value = 3"):
        LengthSampler(3, 3)


def test_seeding_reaches_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        set_seed(7)
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002  as a user's code may

    assert draw() == draw()


def test_respond_to_batch() -> None:
    model, queries = tiny_model("gpt2"), torch.tensor([[5, 6], [7, 8]])
    greedy = respond_to_batch(model, queries, txt_len=4, top_k=1)
    expected = model.generate(
        queries,
        attention_mask=torch.ones_like(queries),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=PAD_ID,
        eos_token_id=None,
    )
    assert torch.equal(greedy, expected[:, 2:])
    set_seed(0)
    assert respond_to_batch(model, queries, txt_len=3).shape == (2, 3)


# --- encoder-decoders ----------------------------------------------------------------------------------------


def test_an_encoder_decoder_from_generation_to_disk(tmp_path: Path) -> None:
    trainer = make_trainer("t5", batch_size=4, mini_batch_size=2, learning_rate=1e-2)
    queries = [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 10]), torch.tensor([11, 12])]
    set_seed(0)
    responses = trainer.generate(queries, max_new_tokens=6, do_sample=True, top_k=0)
    set_seed(0)
    raw = trainer.model.generate(
        input_ids=torch.tensor([[5, 6, 7], [8, 0, 0], [9, 10, 0], [11, 12, 0]]),
        attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]),
        max_new_tokens=6,
        do_sample=True,
        top_k=0,
    )
    for response, row in zip(responses, raw, strict=True):
        assert row[0] == trainer.model.config.decoder_start_token_id
        assert response.tolist() == row[1 : 1 + len(response)].tolist(), "the start token is no choice of the policy"
    scores = [torch.tensor(float(len(set(response.tolist())))) for response in responses]
    stats = trainer.step(queries, responses, scores)
    assert stats["ppo/policy/first_minibatch_ratio_deviation"] <= 1e-4
    trainer.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path)
    for (name, a), b in zip(trainer.model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_decoder_start_token_in_front_of_all_responses_is_taken_off() -> None:
    """Responses as the model's own `generate` gives them are the same batch as without their start token."""
    queries, responses, scores = make_batch()
    masks = [torch.arange(len(response)) % 2 == 0 for response in responses]
    start = torch.tensor([PAD_ID])
    plain, started = make_trainer("t5"), make_trainer("t5")
    expected = plain.step(queries, responses, scores, masks)
    found = started.step(
        queries,
        [torch.cat((start, response)) for response in responses],
        scores,
        [torch.cat((torch.tensor([False]), mask)) for mask in masks],
    )
    assert_same_weights(plain, started, atol=0, rtol=0)
    assert found["tokens/responses_len_mean"] == expected["tokens/responses_len_mean"]


def test_a_start_token_that_only_some_responses_have_was_sampled() -> None:
    queries, responses, scores = make_batch()
    responses[0] = torch.cat((torch.tensor([PAD_ID]), responses[0]))
    stats = make_trainer("t5").step(queries, responses, scores)
    assert stats["tokens/responses_dist"].tolist() == [len(response) for response in responses]
