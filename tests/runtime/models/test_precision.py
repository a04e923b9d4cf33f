"""What trains is float32, by whichever door half precision came in; what is frozen may stay as it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ppo_runtime import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.accel.onednn import obstacle
from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint
from ppo_runtime.models.heads import SplitError, check_split
from ppo_runtime.models.inner import transformers_model
from ppo_runtime.models.precision import HALF, is_widened
from ppo_runtime.models.references import create_reference_model
from tests.operations import Operations
from tests.runtime.support.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch

DTYPES = (torch.bfloat16, torch.float16)
RATE = 1e-5


def parent_of(family: str) -> Any:
    return AutoModelForSeq2SeqLMWithValueHead if family == "t5" else AutoModelForCausalLMWithValueHead


def stored(directory: Path, family: str, dtype: torch.dtype) -> Path:
    tiny_model(family).to(dtype).save_pretrained(directory)
    return directory


def by_path(directory: Path, family: str, dtype: torch.dtype) -> Any:
    return parent_of(family).from_pretrained(stored(directory, family, dtype))


def by_path_and_dtype(directory: Path, family: str, dtype: torch.dtype) -> Any:
    return parent_of(family).from_pretrained(stored(directory, family, dtype), dtype=dtype)


def by_path_and_older_name(directory: Path, family: str, dtype: torch.dtype) -> Any:
    return parent_of(family).from_pretrained(stored(directory, family, dtype), torch_dtype=dtype)


def by_object(directory: Path, family: str, dtype: torch.dtype) -> Any:
    """As transformers loads it when nobody says a dtype."""
    plain = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return parent_of(family).from_pretrained(plain.from_pretrained(stored(directory, family, dtype)))


def by_cast(directory: Path, family: str, dtype: torch.dtype) -> Any:
    """The value head as well."""
    return parent_of(family).from_pretrained(tiny_model(family)).to(dtype)


Door = Callable[[Path, str, torch.dtype], Any]
DOORS: dict[str, Door] = {
    "path": by_path,
    "path, dtype": by_path_and_dtype,
    "path, torch_dtype": by_path_and_older_name,
    "object": by_object,
    "cast": by_cast,
}


def trainer_of(model: Any, reference: Any = None, **more: Any) -> PPOTrainer:
    arguments = {name: more.pop(name) for name in ("optimizer", "num_shared_layers") if name in more}
    fields: dict[str, Any] = SETTINGS | {"learning_rate": RATE, "ppo_epochs": 2} | more
    return PPOTrainer(PPOConfig(**fields), model, reference, tiny_tokenizer(), **arguments)


def check_training(trainer: PPOTrainer, steps: int = 2) -> list[dict[str, Any]]:
    """Train, and see that every weight is trained and large ones move by small updates, and that numbers stay finite.

    Of embeddings, a head tied to them or not, tokens that are in no batch may stay.
    """
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    assert before
    assert {value.dtype for value in before.values()} == {torch.float32}
    tables = {id(m.weight) for m in trainer.model.modules() if isinstance(m, torch.nn.Embedding)}
    reached = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in before.items()}

    def watch(name: str, gradient: Tensor) -> None:
        reached[name] |= gradient != 0

    hooks = [p.register_hook(partial(watch, name)) for name, p in trained.items()]
    history = [trainer.step(*make_batch(seed=seed)) for seed in range(steps)]
    for hook in hooks:
        hook.remove()
    for name, p in trained.items():
        assert reached[name].any(), f"{name} has no gradient"
        chosen = before[name].abs() > 0.01
        if id(p) in tables:
            chosen &= reached[name].any(-1, keepdim=True)
        moved = (p != before[name])[chosen]
        assert moved.sum() >= 0.6 * chosen.sum(), f"{moved.sum()} of {chosen.sum()} weights of {name} above 0.01 moved"
        assert torch.isfinite(p).all()
    assert all(stats["ppo/policy/skipped_updates"] == 0 for stats in history)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for stats in history for value in stats.values())
    # Scoring and training pad differently, and bfloat16 has 8 bits.
    assert all(stats["ppo/policy/first_minibatch_ratio_deviation"] < 0.1 for stats in history)
    return history


def assert_starts_at_the_reference(stats: dict[str, Any]) -> None:
    assert (stats["objective/logprobs"] == stats["objective/ref_logprobs"]).all()
    assert stats["objective/kl"] == 0.0


@pytest.mark.parametrize(
    ("door", "family", "dtype"),
    [
        *((door, "llama", torch.bfloat16) for door in DOORS),
        ("object", "gpt2", torch.float16),
        # T5 keeps some of its modules in float32 when it is loaded in float16.
        ("path, dtype", "t5", torch.float16),
        ("cast", "t5", torch.float16),
    ],
    ids=str,
)
def test_a_policy_that_came_in_half_precision_trains(
    door: str, family: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = DOORS[door](tmp_path, family, dtype)
    half = [name for name, p in model.named_parameters() if p.dtype in HALF]
    assert bool(half) == (door != "path"), "without a dtype, float32 is loaded"
    trainer = trainer_of(model)
    assert is_widened(model) == bool(half)
    assert (f"train in {dtype}" in caplog.text) == bool(half), "said"
    history = check_training(trainer)
    assert_starts_at_the_reference(history[0])
    assert history[1]["objective/kl"] != 0.0


@pytest.mark.parametrize(
    ("shared", "family"),
    [
        ("a copy", "gpt2"),
        ("shared layers", "gpt2"),
        ("shared layers", "opt"),
        ("shared layers", "t5"),
        ("the trainer's shared layers", "llama"),
    ],
)
def test_a_reference_copied_from_a_half_precision_policy_starts_equal(shared: str, family: str) -> None:
    """As scripts have it: half precision, a reference that shares layers, an optimiser of one's own."""
    torch.manual_seed(0)
    model = parent_of(family).from_pretrained(tiny_model(family, layers=3).to(torch.bfloat16))
    reference, more = None, {}
    if shared == "the trainer's shared layers":
        more = {"num_shared_layers": 2}
    else:
        reference = create_reference_model(model, 2 if shared == "shared layers" else None)
        more = {"optimizer": torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)}
    trainer = trainer_of(model, reference, **more)
    assert_starts_at_the_reference(check_training(trainer)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_reference_may_stay_half(dtype: torch.dtype) -> None:
    """Beside a float32 policy the first KL is then rounding, and not 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    reference = tiny_model("llama").to(dtype)
    history = check_training(trainer_of(model, reference))
    assert {p.dtype for p in reference.parameters()} == {dtype}
    assert 0.0 < abs(history[0]["objective/kl"]) < 0.5


def lora_on(base: Any, **options: Any) -> Any:
    fields = {"modules_to_save": options.pop("modules_to_save")} if "modules_to_save" in options else {}
    return peft.get_peft_model(base, tiny_lora(base.config.model_type, **fields), **options)


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "as peft makes them": lora_on,
    "left in half precision": lambda base: lora_on(base, autocast_adapter_dtype=False),
    "cast with their base": lambda base: lora_on(base).to(base.dtype),
    "a copy of the head": lambda base: lora_on(base, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize(
    ("way", "family", "dtype"),
    [
        *((way, "llama", torch.bfloat16) for way in ADAPTERS),
        # peft copies no head that is tied to the embeddings, as T5's is.
        *((way, "t5", torch.float16) for way in ("as peft makes them", "left in half precision")),
    ],
    ids=str,
)
def test_adapters_are_float32_on_a_base_that_stays_half(way: str, family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = parent_of(family).from_pretrained(ADAPTERS[way](tiny_model(family).to(dtype)))
    trainer = trainer_of(model)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values() if p.ndim > 1} == {dtype}
    assert is_widened(model) == (way != "as peft makes them")
    before = {name: p.clone() for name, p in frozen.items()}
    queries, _, _ = make_batch()
    trainer.generate(queries, return_prompt=False, max_new_tokens=3, do_sample=True)
    # LoRA's second matrix starts at 0, and so has no large weights yet; the first one has no gradient at the start.
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    history = [trainer.step(*make_batch(seed=seed)) for seed in range(3)]
    after = dict(model.named_parameters())
    assert all(torch.isfinite(p).all() for p in after.values())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    moved = [name for name, value in adapters.items() if "lora_" in name and not torch.equal(after[name], value)]
    assert len(moved) > len([name for name in adapters if "lora_B" in name]), "both matrices, once the second is not 0"
    if way != "a copy of the head":  # in float32, beside the reference's half
        assert_starts_at_the_reference(history[0])


def linear_dtypes(model: Any) -> list[torch.dtype]:
    """What the linear layers of the trunk give, in every forward pass from here on."""
    seen: list[torch.dtype] = []
    for module in transformers_model(model).base_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    return seen


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_widened_policy_computes_in_bfloat16_and_others_as_they_are(family: str) -> None:
    for dtype, computed in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.float32,) * 2):
        trainer = trainer_of(parent_of(family).from_pretrained(tiny_model(family).to(dtype)))
        seen = linear_dtypes(trainer.model)
        more = {"decoder_input_ids": torch.tensor([[5, 6]])} if family == "t5" else {}
        logits, _, values = trainer.model(torch.tensor([[5, 6]]), **more)
        assert logits.dtype == values.dtype == torch.float32
        queries, responses, scores = make_batch()
        trainer.generate(queries, max_new_tokens=2)
        trainer.step(queries, responses, scores)
        assert set(seen) == {computed}


def linear_errors(model: Any) -> list[float]:
    """How far every linear layer's output is, in each pass from here on, from that of the weights as they are then."""
    seen: list[float] = []

    def compare(module: torch.nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        given = (args[0], module.weight, module.bias)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            x, weight, bias = (None if tensor is None else tensor.to(output.dtype) for tensor in given)
            assert x is not None
            assert weight is not None
            seen.append(float((torch.nn.functional.linear(x, weight, bias) - output).abs().max()))

    for module in model.pretrained_model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(compare)
    return seen


@pytest.mark.parametrize("door", ["step", "the older trainer's pieces"])
@pytest.mark.parametrize("family", ["opt", "t5"])
def test_every_update_computes_with_the_weights_of_the_one_before(family: str, door: str) -> None:
    """Weights cast in one pass, the rollout's above all, must be cast anew in the next."""
    torch.manual_seed(0)
    trainer = trainer_of(parent_of(family).from_pretrained(tiny_model(family).to(torch.bfloat16)), learning_rate=1e-2)
    seen = linear_errors(trainer.model)
    queries, responses, scores = make_batch()
    if door == "step":
        trainer.step(queries, responses, scores)
    else:
        inputs = trainer.prepare_model_inputs(queries, responses)
        for _ in range(2):
            logprobs, _, values, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
            zeros = torch.zeros_like(logprobs)
            old = (logprobs.detach(), values.detach())
            trainer.train_minibatch(*old, logprobs, None, values, mask, zeros + 1.0, zeros)
    assert len(seen) > 10
    assert max(seen) == 0.0


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_rollout_casts_its_weights_once_and_packs_none(family: str) -> None:
    """A decode step reads every weight, and a cast takes longer than the product it is for."""
    torch.manual_seed(0)
    trainer = trainer_of(parent_of(family).from_pretrained(tiny_model(family).to(torch.bfloat16)), accel="onednn")
    queries, responses, scores = make_batch()
    layers = [m for m in transformers_model(trainer.model).modules() if isinstance(m, torch.nn.Linear)]
    weights = {(layer.weight.shape,) for layer in layers}
    assert "computes in bfloat16, and float32 layers alone" in str(obstacle(transformers_model(trainer.model)))
    trainer.generate(queries, max_new_tokens=2)  # the model has been tried from here on
    casts: list[int] = []
    for tokens in (4, 8):
        with Operations() as operations:
            trainer.generate(queries, max_new_tokens=tokens, min_new_tokens=tokens)
        casts.append(sum(ran.made in weights for ran in operations.ran if ran.name == "_to_copy"))
    assert len(layers) <= casts[0] == casts[1]
    seen = linear_errors(trainer.model)
    for _ in range(2):
        trainer.step(queries, responses, scores)
        trainer.generate(queries, max_new_tokens=2)
    assert max(seen) == 0.0, "of the weights as they are then"


def test_a_rollout_inside_an_autocast_reads_and_leaves_no_weights_of_another_time() -> None:
    model = half_policy()
    trainer = trainer_of(model)
    query = torch.tensor([5, 6, 7])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.pretrained_model(query[None])  # its weights are cast and kept
        for scale in (3.0, -1.0):
            with torch.no_grad():
                for parameter in model.pretrained_model.parameters():
                    parameter.mul_(scale)
            found = trainer.generate(query, max_new_tokens=4, do_sample=False)
            with torch.autocast("cpu", enabled=False):
                torch.clear_autocast_cache()
                assert torch.equal(found, trainer.generate(query, max_new_tokens=4, do_sample=False))
            logits = model.pretrained_model(query[None]).logits
            assert logits.requires_grad, "what a rollout has cast carries no gradient"
            weight = model.pretrained_model.get_input_embeddings().weight
            assert torch.autograd.grad(logits.sum(), weight)[0].any()


def test_checkpointed_layers_recompute_under_the_same_autocast() -> None:
    histories = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama").to(torch.bfloat16))
        if checkpointing:
            model.gradient_checkpointing_enable()
        histories.append(check_training(trainer_of(model), steps=2))
    assert histories[0][1]["ppo/loss/total"] == histories[1][1]["ppo/loss/total"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_autocast_around_a_step_changes_nothing(dtype: torch.dtype) -> None:
    """Its cache would outlive the updates inside, and its precision reach the losses and the advantages."""
    results: list[dict[str, Tensor]] = []
    for enabled in (False, True):
        torch.manual_seed(0)
        trainer = trainer_of(
            AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama").to(dtype)), learning_rate=1e-2
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for seed in range(2):
                trainer.model(torch.tensor([[5, 6]]))
                trainer.step(*make_batch(seed=seed))
            inside = trainer.model(torch.tensor([[5, 6]]))[0]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert torch.equal(trainer.model(torch.tensor([[5, 6]]))[0], inside), "of the weights as they are now"
        results.append(trainer.model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_a_widened_policy_is_saved_resumed_and_loaded(tmp_path: Path) -> None:
    def trainer() -> PPOTrainer:
        torch.manual_seed(0)
        return trainer_of(AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama").to(torch.bfloat16)))

    first, second = trainer(), trainer()
    first.step(*make_batch())
    save_checkpoint(first, tmp_path / "checkpoint")
    load_checkpoint(second, tmp_path / "checkpoint")
    for one in (first, second):
        one.step(*make_batch(seed=1))
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    first.save_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert plain.dtype == torch.float32
    for name, value in plain.state_dict().items():
        assert torch.equal(first.model.pretrained_model.state_dict()[name], value), name


def test_an_optimiser_in_half_precision_is_named_before_anything_trains() -> None:
    def policy() -> Any:
        return AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama").to(torch.bfloat16))

    model = policy()
    stranger = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"optimizer steps a parameter of shape \(3, 4\).*torch.float16.*require grad"):
        trainer_of(model, optimizer=torch.optim.Adam([*model.parameters(), stranger]))
    assert model.pretrained_model.dtype == torch.bfloat16, "a refusal changes nothing"
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.tensor([[5, 6]]))[0].sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"optimizer holds exp_avg of .* in torch.bfloat16.*load model with dtype"):
        trainer_of(model, optimizer=optimizer)
    assert model.pretrained_model.dtype == torch.bfloat16


def test_what_is_said_when_nothing_is_wrong_is_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    trainer_of(AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama")))
    trainer_of(AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama").double()))
    assert "autocast" not in caplog.text


def test_how_a_dtype_is_asked_for(tmp_path: Path) -> None:
    directory = stored(tmp_path / "half", "llama", torch.bfloat16)
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    assert load(directory, dtype="auto").pretrained_model.dtype == torch.bfloat16
    assert load(directory, dtype="float16").pretrained_model.dtype == torch.float16
    assert load(directory, torch_dtype=torch.float64).pretrained_model.dtype == torch.float64
    for nothing in ({"dtype": None}, {"torch_dtype": None}, {"dtype": torch.float32, "torch_dtype": None}):
        assert load(directory, **nothing).pretrained_model.dtype == torch.float32
    for pair in (("float16", torch.float16), (torch.float16, "torch.float16"), ("auto", "auto")):
        both = load(directory, dtype=pair[0], torch_dtype=pair[1]).pretrained_model.dtype
        assert both == (torch.bfloat16 if "auto" in pair else torch.float16)
    assert load(directory, dtype="torch.bfloat16").pretrained_model.dtype == torch.bfloat16
    odd: Any
    for odd in ("bf16", 3, torch.int64, "float99", "int8"):
        for name in ("dtype", "torch_dtype"):
            with pytest.raises(ValueError, match=f"^{name} is {odd!r}, expected a floating-point dtype"):
                load(directory, **{name: odd})
    with pytest.raises(ValueError, match=r"dtype is torch.float32 and torch_dtype.* is torch.float16; pass one"):
        load(directory, dtype=torch.float32, torch_dtype=torch.float16)
    adapted = load(directory, peft_config=tiny_lora("llama"))
    adapted.save_pretrained(tmp_path / "adapter")
    for model, dtype in (
        (adapted, torch.float32),
        (load(tmp_path / "adapter"), torch.float32),
        (load(tmp_path / "adapter", dtype=torch.bfloat16), torch.bfloat16),
    ):
        assert {p.dtype for p in model.pretrained_model.parameters() if not p.requires_grad} == {dtype}
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_quantised_weights_keep_the_dtypes_of_their_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = stored(tmp_path, "llama", torch.bfloat16)
    loaded: list[dict[str, Any]] = []

    def record(name: Any, **kwargs: Any) -> Any:
        loaded.append(kwargs)
        return tiny_model("llama")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    load(directory)
    load(directory, quantization_config={"quant_method": "x"})
    config = copy.deepcopy(tiny_model("llama").config)
    config.quantization_config = {"quant_method": "x"}
    load(directory, config=config)
    assert [kwargs.get("dtype") for kwargs in loaded] == [torch.float32, None, None]


def half_policy(dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama").to(dtype))


def test_a_value_head_that_alone_trains_in_half_precision_is_widened_alone(caplog: pytest.LogCaptureFixture) -> None:
    plain = lora_on(tiny_model("llama").to(torch.bfloat16))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(plain)
    model.v_head.to(torch.bfloat16)
    trainer = trainer_of(model)
    assert "2 parameters of the policy train in torch.bfloat16 (the first: v_head" in caplog.text
    assert {p.dtype for p in plain.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert not is_widened(model)
    assert_starts_at_the_reference(trainer.step(*make_batch()))


def test_a_policy_too_large_for_float16_is_widened_first_and_what_is_not_finite_is_named() -> None:
    def policy(dtype: torch.dtype) -> Any:
        plain = tiny_model("llama")
        for name, p in plain.named_parameters():
            if "gate_proj" in name or "up_proj" in name:
                p.data *= 5e3
        return AutoModelForCausalLMWithValueHead.from_pretrained(plain.to(dtype))

    trainer_of(policy(torch.float16))
    with pytest.raises(SplitError, match=r"logits of LlamaForCausalLM are not finite.*too large for torch.float16"):
        check_split(policy(torch.float16))


def test_a_half_reference_of_a_widened_policy_is_widened_by_every_trainer() -> None:
    model = half_policy()
    trainer_of(model)
    reference = tiny_model("llama").to(torch.bfloat16)
    trainer = trainer_of(model, reference)
    assert is_widened(reference)
    seen = linear_dtypes(reference)
    queries, responses, scores = make_batch()
    trainer.generate(queries, max_new_tokens=2, generate_ref_response=True)
    assert set(seen) == {torch.bfloat16}, "it answers in the precision that it is scored in"
    assert_starts_at_the_reference(trainer.step(queries, responses, scores))


def test_an_optimiser_that_begins_with_half_sums_is_told_a_way_out() -> None:
    model = half_policy()
    with pytest.raises(ValueError, match=r"holds sum of .*dtype=torch.float32 \(or call model.float\(\)"):
        trainer_of(model, optimizer=torch.optim.Adagrad(model.parameters()))
    model.float()
    trainer_of(model, optimizer=torch.optim.Adagrad(model.parameters())).step(*make_batch())


def test_a_refused_constructor_leaves_the_policy_in_half_precision() -> None:
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(other)
    model = half_policy()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"optimizer": 3}, "optimizer is a int"),
        ({"optimizer": other}, "optimizer steps|optimizer holds none"),
        ({"lr_scheduler": scheduler}, "lr_scheduler is of another optimizer"),
        ({"num_shared_layers": 9}, "num_shared_layers is 9"),
        ({"ref_model": "gpt2"}, "ref_model is a str"),
    ]
    for arguments, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            PPOTrainer(PPOConfig(**SETTINGS), model, tokenizer=tiny_tokenizer(), **arguments)
        assert {p.dtype for p in model.pretrained_model.parameters()} == {torch.bfloat16}, message


def test_a_policy_whose_value_head_alone_trains_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama").requires_grad_(False))
    trainer_of(model)
    assert caplog.text.count("nothing of the language model trains") == 1


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("gpt2", TypeError, "ref_model is a str, expected a value-head model or a transformers model"),
        (tiny_model("llama").base_model, ValueError, "ref_model is a LlamaModel, which has no language-model head"),
        (tiny_model("t5"), ValueError, "ref_model is an encoder-decoder, expected decoder-only like model"),
    ],
    ids=["a name", "a trunk", "an encoder-decoder"],
)
def test_a_reference_of_another_kind_is_named(reference: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trainer_of(half_policy(), reference)
