"""LoRA policies: what trains, what stays, what is saved, half precision, and a reward model as a second adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from ppo_runtime import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    set_seed,
)
from ppo_runtime.models.references import reference_context
from tests.runtime.support.tiny import tiny_config, tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    parent = AutoModelForSeq2SeqLMWithValueHead if family == "t5" else AutoModelForCausalLMWithValueHead
    base: Any = tiny_model(family)
    return parent.from_pretrained(base.to(dtype), peft_config=tiny_lora(family), **kwargs)


def trainer_of(model: Any, **settings: Any) -> PPOTrainer:
    fields: dict[str, Any] = SETTINGS | {"learning_rate": 1e-2} | settings
    return PPOTrainer(PPOConfig(**fields), model, None, tiny_tokenizer())


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_only_adapter_and_head_change_and_the_reference_stays(family: str) -> None:
    """The reference's log-probabilities are bit-equal after three steps; the policy's are not."""
    set_seed(0)
    trainer = trainer_of(adapted(family))
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    assert trainer.ref_model is None
    batch = make_batch()
    history = [trainer.step(*batch) for _ in range(3)]
    for stats in history:
        assert (stats["objective/ref_logprobs"] == history[0]["objective/ref_logprobs"]).all()
        assert stats["ppo/policy/first_minibatch_ratio_deviation"] <= 1e-4
    assert (history[0]["objective/logprobs"] == history[0]["objective/ref_logprobs"]).all(), "LoRA begins at 0"
    assert (history[2]["objective/logprobs"] != history[0]["objective/logprobs"]).any()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name or name.startswith("v_head.")}


def test_a_half_precision_policy_trains_with_a_head_in_float32(tmp_path: Path) -> None:
    trainer = trainer_of(adapted(dtype=torch.bfloat16))
    assert trainer.model.v_head.summary.weight.dtype == torch.float32
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    queries, _, scores = make_batch()
    responses = trainer.generate(queries, return_prompt=False, max_new_tokens=4, do_sample=True)
    for _ in range(2):
        stats = trainer.step(queries, responses, scores)
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in stats.values())
        # Scoring and training pad differently, and bfloat16 has 8 bits.
        assert stats["ppo/policy/first_minibatch_ratio_deviation"] < 0.1
    named = dict(trainer.model.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in frozen.items())
    assert all(torch.isfinite(parameter).all() for parameter in named.values())


def test_a_trained_adapter_is_saved_and_loaded_with_its_head(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "base", peft_config=tiny_lora("llama"))
    trainer = trainer_of(model)
    trainer.step(*make_batch())
    trainer.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter")
    # LoRA tensors come back under the same names, and training may go on.
    for (name, a), (other, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad, name
    trainer_of(loaded).step(*make_batch())


# --- a reward model as a second adapter --------------------------------------------------------------------------


def make_reward_model(directory: Path, family: str = "llama", *, more: Any = None, **fields: Any) -> tuple[Any, Path]:
    """A sequence classifier with an adapter on the weights of `tiny_model(family)`, saved as peft saves it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        classifier = AutoModelForSequenceClassification.from_config(tiny_config(family, num_labels=2, **(more or {})))
        missing = classifier.load_state_dict(tiny_model(family, **(more or {})).state_dict(), strict=False)
        assert missing.missing_keys == ["score.weight"]
        defaults = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False}
        model = peft.get_peft_model(classifier, peft.LoraConfig(task_type="SEQ_CLS", **(defaults | fields))).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.data += torch.randn_like(parameter)
    model.save_pretrained(str(directory / "reward"))
    return model, directory / "reward"


@pytest.fixture
def reward_model(tmp_path: Path) -> tuple[Any, Path]:
    return make_reward_model(tmp_path)


def test_a_reward_adapter_scores_like_the_reward_model(reward_model: tuple[Any, Path], tmp_path: Path) -> None:
    model, directory = reward_model
    policy = adapted(reward_adapter=str(directory))
    trainer = trainer_of(policy)
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert not any("reward_model_adapter" in name for name in names)
    rows = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10])]
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    def scores() -> list[Tensor]:
        found = policy.compute_reward_score(ids, mask)
        assert found.shape == (2, 4, 2)
        return [found[0, 3], found[1, 1]]

    with torch.no_grad():
        expected = [model(row[None]).logits[0] for row in rows]
    for one, other in zip(scores(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    before = scores()
    stats = trainer.step(*make_batch())
    assert stats["ppo/policy/approxkl"] > 0, "the policy's own adapter is active again, and trains"
    for one, other in zip(scores(), before, strict=True):
        assert torch.equal(one, other)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == names

    trainer.save_pretrained(tmp_path / "policy")
    assert not [file for file in (tmp_path / "policy").rglob("*") if "reward" in file.name]


def test_the_bases_head_serves_an_adapter_beside_weights_that_hold_none(tmp_path: Path) -> None:
    base = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    base.save_pretrained(tmp_path / "base")
    on_it: Any = peft.get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tiny_lora("llama"))
    on_it.save_pretrained(str(tmp_path / "adapter"))
    save_file({"pretrained_model.lm_head.weight": torch.zeros(1)}, tmp_path / "adapter" / "model.safetensors")
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter")
    assert torch.equal(policy.v_head.summary.weight, base.v_head.summary.weight)


def test_a_subfolder_of_the_policy_is_none_of_its_reward_adapters(
    reward_model: tuple[Any, Path], tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "several" / "policy")
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(
        tmp_path / "several", subfolder="policy", peft_config=tiny_lora("llama"), reward_adapter=reward_model[1]
    )
    assert policy.compute_reward_score(torch.tensor([[5, 6]])).shape == (1, 2, 2)


def test_reward_adapters_that_cannot_work_are_named(reward_model: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass peft_config as well"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"), reward_adapter=str(reward_model[1]))
    with pytest.raises(ValueError, match="pass reward_adapter= to from_pretrained"):
        adapted().compute_reward_score(torch.tensor([[5]]))
    adapted().save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="holds no score head"):
        adapted(reward_adapter=tmp_path / "policy")
    with pytest.raises(OSError, match="'/no/such/reward' is no directory here, and no name of a repository"):
        adapted(reward_adapter="/no/such/reward")
    with pytest.raises(ValueError, match=r"reward_adapter .* holds no adapter_config\.json"):
        adapted(reward_adapter=tmp_path)
    for name in ("", "a.b", "default"):
        with pytest.raises(
            ValueError, match=f"reward_adapter_name is '{name}', expected a name without dots, other than"
        ):
            adapted(reward_adapter=reward_model[1], reward_adapter_name=name)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "more layers": ({"more": {"num_hidden_layers": 3}}, r"layers\.2\..* has no place in it, and \d+ more like it"),
    "fewer layers": (
        {"more": {"num_hidden_layers": 1}, "target_modules": ["q_proj"]},
        r"nothing is stored for .*layers\.1\.",
    ),
    "another width": ({"more": {"hidden_size": 32}}, r"has the shape \(32, 3\) and its place \(16, 3\)"),
    "another architecture": ({"family": "opt"}, "not found in the base model"),
    "a norm of the base's": ({"modules_to_save": ["norm"]}, r"norm\.weight has no place in it"),
    "biases of the base's": ({"more": {"attention_bias": True}, "bias": "all"}, r"bias has no place in it"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_reward_adapter_of_another_model_is_refused_and_leaves_the_policy_alone(case: str, tmp_path: Path) -> None:
    """Half of an adapter gives scores like any other; weights that are the policy's too would change the policy."""
    fields, problem = MISFITS[case]
    _, directory = make_reward_model(tmp_path, **fields)
    more = {"attention_bias": True} if "biases" in case else {}
    model: Any = peft.get_peft_model(tiny_model("llama", **more), tiny_lora("llama"))
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"reward_adapter '.*reward' is not for this LlamaForCausalLM: .*{problem}"):
        AutoModelForCausalLMWithValueHead.from_pretrained(model, reward_adapter=directory)
    assert {name for name, _ in model.named_parameters()} == before.keys()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]), name
        assert p.requires_grad == before[name][1], name


def test_copies_of_the_bases_weights_in_a_reward_adapter_do_no_harm(tmp_path: Path) -> None:
    """As peft stores embeddings to be safe."""
    model, directory = make_reward_model(tmp_path)
    model.save_pretrained(str(directory), save_embedding_layers=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(ids).logits[0]
    found = adapted(reward_adapter=directory).compute_reward_score(ids)[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_scores_leave_every_active_adapter_active_and_are_the_same_while_they_are_off(
    reward_model: tuple[Any, Path],
) -> None:
    inner: Any = peft.get_peft_model(tiny_model("llama"), tiny_lora("llama", init_lora_weights=False))
    inner.add_adapter("second", tiny_lora("llama", init_lora_weights=False))
    inner.base_model.set_adapter(["default", "second"])
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(inner, reward_adapter=reward_model[1])
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = policy(ids)[0]
        scores = policy.compute_reward_score(ids)
        assert inner.active_adapters == ["default", "second"]
        assert torch.equal(policy(ids)[0], before)
        with reference_context(policy):
            off = policy(ids)[0]
            assert torch.equal(policy.compute_reward_score(ids), scores)
            assert torch.equal(policy(ids)[0], off), "and off again afterwards"
        assert torch.equal(policy(ids)[0], before)
