"""One PPO step: what it reports, what it leaves alone, and what it refuses."""

import copy
from collections.abc import Callable
from linecache import getline
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, Trainer
from ppo_runtime.assembly import special_tokens
from ppo_runtime.reporting.metrics import METRICS
from tests.runtime.support.tiny import FAMILIES, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import make_batch, make_trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_minibatch_ratio_is_one(family: str) -> None:
    """Scoring and training see the same policy: max |ratio - 1| <= 1e-4 before the first update, dropout or not."""
    stats = make_trainer(family, dropout=0.3).step(*make_batch())
    assert stats["ppo/policy/first_minibatch_ratio_deviation"] <= 1e-4
    assert stats["ppo/policy/approxkl"] > 1e-6, "the later minibatches saw another policy, so the check can fail"


def test_the_ratio_check_sees_a_policy_that_changed_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    from ppo_runtime import trainer as module

    score = module.score_rollout

    def score_then_move(*args: Any, **kwargs: Any) -> Any:
        scored = score(*args, **kwargs)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        return scored

    monkeypatch.setattr(module, "score_rollout", score_then_move)
    assert trainer.step(*make_batch())["ppo/policy/first_minibatch_ratio_deviation"] > 1e-3


def test_statistics_are_those_of_the_table() -> None:
    stats = make_trainer().step(*make_batch())
    assert set(METRICS) <= set(stats)
    for name, value in stats.items():
        assert torch.isfinite(torch.as_tensor(value)).all(), name


def test_the_reference_does_not_move_and_the_policy_does() -> None:
    trainer = make_trainer()
    policy = copy.deepcopy(trainer.model.state_dict())
    reference = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.step(*make_batch())
    assert all(torch.equal(reference[name], value) for name, value in trainer.ref_model.state_dict().items())
    assert not all(torch.equal(policy[name], value) for name, value in trainer.model.state_dict().items())


def test_kl_is_zero_against_oneself_and_grows_with_training() -> None:
    trainer = make_trainer(learning_rate=1e-2)
    batch = make_batch()
    first, second = trainer.step(*batch), trainer.step(*batch)
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert abs(second["objective/kl"]) > 1e-2


def test_a_repeated_run_is_the_same_run() -> None:
    runs = [make_trainer(dropout=0.3).step(*make_batch()) for _ in range(2)]
    for name in METRICS:
        if not name.startswith("time/"):
            assert (torch.as_tensor(runs[0][name]) == torch.as_tensor(runs[1][name])).all(), name


def test_a_shorter_last_batch_is_legal_without_drop_last() -> None:
    with pytest.raises(ValueError, match="drop_last=False"):
        make_trainer().step(*make_batch(5))
    stats = make_trainer(drop_last=False).step(*make_batch(5))
    assert len(stats["objective/kl_dist"]) == 5


def _bad_inputs() -> dict[str, tuple[Callable[[Any, Any, Any], tuple[Any, ...]], str]]:
    long = torch.full((60,), 5)
    return {
        "empty lists": (lambda q, r, s: ([], [], []), "queries is an empty list"),
        "not a list": (lambda q, r, s: (torch.stack([q[0]] * 6), r, s), "queries is a Tensor"),
        "fewer responses": (lambda q, r, s: (q, r[:-1], s), "responses has 5 rows, expected 6"),
        "fewer scores": (lambda q, r, s: (q, r, s[:-1]), "scores has 5 entries, expected 6"),
        "wrong batch size": (lambda q, r, s: (q[:4], r[:4], s[:4]), "queries has 4 rows, expected batch_size = 6"),
        "NaN score": (lambda q, r, s: (q, r, [*s[:-1], torch.tensor(float("nan"))]), r"scores\[5\] is nan"),
        "infinite score": (lambda q, r, s: (q, r, [torch.tensor(float("inf")), *s[1:]]), r"scores\[0\] is inf"),
        "two scores": (lambda q, r, s: (q, r, [torch.zeros(2), *s[1:]]), r"scores\[0\] has shape \(2,\)"),
        "empty prompt": (lambda q, r, s: ([q[0][:0], *q[1:]], r, s), r"queries\[0\] is empty"),
        "empty response": (lambda q, r, s: (q, [r[0][:0], *r[1:]], s), r"responses\[0\] is empty"),
        "batch axis": (lambda q, r, s: ([q[0][None], *q[1:]], r, s), r"queries\[0\] has shape"),
        "float ids": (lambda q, r, s: ([q[0].float(), *q[1:]], r, s), r"queries\[0\] has dtype torch.float32"),
        "id too high": (lambda q, r, s: (q, [r[0] + 1000, *r[1:]], s), r"responses\[0\] holds token id"),
        "too long": (lambda q, r, s: ([long, *q[1:]], [long, *r[1:]], s), r"queries\[0\].*120 tokens.*context is 64"),
        "masks too few": (lambda q, r, s: (q, r, s, [torch.ones(1)]), "response_masks has 1 rows"),
        "mask length": (
            lambda q, r, s: (q, r, s, [torch.ones(len(x) + 1) for x in r]),
            r"response_masks\[0\] is .* like responses\[0\]",
        ),
        "mask values": (lambda q, r, s: (q, r, s, [torch.full((len(x),), 2) for x in r]), "other values than 0 and 1"),
    }


@pytest.mark.parametrize("case", _bad_inputs())
def test_bad_input_is_named_and_loses_nothing(case: str) -> None:
    spoil, message = _bad_inputs()[case]
    trainer = make_trainer()
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=message):
        trainer.step(*spoil(*make_batch()))
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    assert trainer.current_step == 0
    assert not trainer.optimizer.state
    trainer.step(*make_batch())


def test_generate_refuses_an_empty_prompt_and_one_without_room() -> None:
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"query_tensor\[0\] is empty"):
        trainer.generate([torch.tensor([], dtype=torch.long)], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"prompt \+ max_new_tokens is 70 tokens, but the model's context is 64"):
        trainer.generate(torch.full((60,), 5), max_new_tokens=10)


def test_a_tokenizer_without_padding_pads_with_eos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    trainer = make_trainer(tokenizer=tokenizer)
    assert trainer.pad_token_id == tokenizer.eos_token_id
    trainer.step(*make_batch())


@pytest.mark.parametrize("eos", [7, [7, 5], torch.tensor([7, 5]), np.int64(7), [], None])
def test_what_ends_a_response_is_read_as_generate_reads_it(eos: Any) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = eos
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    several = isinstance(eos, list | torch.Tensor) and len(eos) > 0
    expected = {7, 5} if several else {7} if eos == 7 else {tokenizer.eos_token_id}
    _, ends = special_tokens(tokenizer, wrapped)
    assert ends == expected
    assert all(type(token) is int for token in ends)


def test_an_end_that_is_no_token_is_refused() -> None:
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    wrapped.pretrained_model.generation_config.eos_token_id = "</s>"
    with pytest.raises(ValueError, match="eos_token_id is '</s>', expected a token id or a list of them"):
        special_tokens(tiny_tokenizer(), wrapped)


def test_a_tokenizer_with_neither_padding_nor_eos_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    with pytest.raises(ValueError, match="neither a padding nor an EOS token"):
        PPOTrainer(PPOConfig(batch_size=2, accel="eager"), wrapped, None, tokenizer)


def test_a_reference_with_another_vocabulary_is_refused() -> None:
    other = tiny_model("llama", vocab_size=90)
    with pytest.raises(ValueError, match="ref_model has a vocabulary of 90, expected"):
        make_trainer(ref_model=other)


def test_wrong_kinds_are_refused_by_name() -> None:
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    with pytest.raises(TypeError, match="model is a LlamaForCausalLM"):
        PPOTrainer(PPOConfig(), wrapped.pretrained_model, None, tiny_tokenizer())
    with pytest.raises(TypeError, match="tokenizer is None"):
        PPOTrainer(PPOConfig(), wrapped)
    with pytest.raises(TypeError, match="config is a dict"):
        PPOTrainer({}, wrapped, None, tiny_tokenizer())


def test_shared_layers_beside_a_given_reference_are_pointed_out() -> None:
    class Own(PPOTrainer):
        pass

    for kind in (Trainer, PPOTrainer, Own):
        model, reference = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama")), tiny_model("llama")
        with pytest.warns(UserWarning, match="num_shared_layers is 1 and ref_model is given") as seen:
            trainer = kind(PPOConfig(), model, tokenizer=tiny_tokenizer(), ref_model=reference, num_shared_layers=1)
        lines = [getline(warning.filename, warning.lineno) for warning in seen]
        assert len(lines) == 1
        assert "kind(PPOConfig()" in lines[0], "the line that makes the trainer"
        assert trainer.ref_model is reference
        assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_plain_model_serves_as_reference() -> None:
    trainer = make_trainer(ref_model=tiny_model("llama", seed=1))
    assert trainer.step(*make_batch())["objective/kl"] != 0.0


def test_saved_models_load_in_plain_transformers(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = make_trainer()
    trainer.step(*make_batch())
    trainer.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == trainer.tokenizer.eos_token_id
    ids = torch.tensor([[5, 6, 7]])
    logits, _, values = trainer.model(ids)
    assert torch.equal(plain(ids).logits, logits)
    assert torch.equal(again(ids)[2], values)


def _adam(model: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, **options)


# From the policy to (optimizer, lr_scheduler), and what is said of them.
UNFIT: dict[str, tuple[Callable[[Any], tuple[Any, Any]], str]] = {
    "optimiser of a copy": (lambda m: (_adam(copy.deepcopy(m)), None), "optimizer holds none of the .* parameters"),
    "optimiser's class": (lambda m: (torch.optim.Adam, None), "optimizer is a class"),
    "optimiser's name": (lambda m: ("adam", None), "optimizer is a str"),
    "optimiser that wants a closure": (lambda m: (torch.optim.LBFGS(m.parameters()), None), r"step\(\) wants closure"),
    "parameters": (lambda m: (list(m.parameters()), None), "optimizer is a list"),
    "scheduler's name": (lambda m: (_adam(m), "cosine"), "lr_scheduler is a str"),
    "scheduler's class": (lambda m: (_adam(m), torch.optim.lr_scheduler.LambdaLR), "lr_scheduler is a class"),
    "scheduler of another optimiser": (
        lambda m: (_adam(m), torch.optim.lr_scheduler.ConstantLR(_adam(m))),
        "lr_scheduler is of another optimizer",
    ),
    "scheduler without its optimiser": (
        lambda m: (None, torch.optim.lr_scheduler.ConstantLR(_adam(m))),
        "lr_scheduler is of another optimizer.*optimizer=",
    ),
    "scheduler that wants a metric": (
        lambda m: (optimizer := _adam(m), torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)),
        r"lr_scheduler is a ReduceLROnPlateau, .*step\(\) .*metrics",
    ),
    "scheduler without a state": (
        lambda m: (_adam(m), SimpleNamespace(step=lambda: None)),
        "lr_scheduler is a SimpleNamespace without state_dict",
    ),
    "scheduler whose state cannot be taken over": (
        lambda m: (_adam(m), SimpleNamespace(step=lambda: None, state_dict=dict)),
        "lr_scheduler is a SimpleNamespace without load_state_dict",
    ),
    "nothing trains": (lambda m: (None, m.requires_grad_(False) and None), "model has no parameter that trains"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_optimiser_or_scheduler_that_cannot_work_is_refused_when_the_trainer_is_made(case: str) -> None:
    make, message = UNFIT[case]
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    optimizer, scheduler = make(model)
    config = PPOConfig(batch_size=6, mini_batch_size=2, accel="eager")
    with pytest.raises((ValueError, TypeError), match=message):
        PPOTrainer(config, model, None, tiny_tokenizer(), optimizer=optimizer, lr_scheduler=scheduler)


def test_an_optimiser_of_some_parameters_is_taken_and_the_others_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(optimizer_of=lambda model: torch.optim.Adam(model.v_head.parameters()))
    assert "optimizer holds 2 of the 23 parameters that train" in caplog.text
    caplog.clear()
    make_trainer(optimizer_of=_adam)
    assert not caplog.messages


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer, [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)], milestones=[1]
        ),
        lambda optimizer: torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.ConstantLR(optimizer)]),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=9),
    ],
    ids=["sequential", "chained", "one cycle"],
)
def test_schedulers_of_the_optimiser_work(make: Any) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    optimizer = _adam(model)
    config = PPOConfig(batch_size=6, mini_batch_size=2, accel="eager")
    trainer = PPOTrainer(config, model, None, tiny_tokenizer(), optimizer=optimizer, lr_scheduler=make(optimizer))
    trainer.step(*make_batch())


def test_a_history_shares_the_names_of_its_statistics() -> None:
    """What a long run keeps of a step is its numbers; names that are made anew would be a third of it."""
    from ppo_runtime.reporting.statistics import scalars

    trainer = make_trainer()
    one, other = (scalars(trainer.step(*make_batch())) for _ in range(2))
    assert all(a is b for a, b in zip(one, other, strict=True))
