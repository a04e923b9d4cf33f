"""Trunk and head, apart, are the model: logits, gradients, and no influence of padding."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, RecurrentGemmaConfig

from ppo_runtime.models.heads import (
    SplitError,
    check_split,
    hidden_states,
    lm_head,
    logits_at,
    mask_positions,
    reads_padding,
    seq2seq_hidden_states,
)
from ppo_runtime.models.references import reference_context
from ppo_runtime.models.wrapper import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from tests.runtime.support.tiny import (
    ALL_FAMILIES,
    CAUSAL_FAMILIES,
    PAD_ID,
    SEQ2SEQ_FAMILIES,
    VOCAB_SIZE,
    tiny_lora,
    tiny_model,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)  # for the value heads; `tiny_model` has a seed of its own


REAL = torch.tensor([[5, 9, 33, 70, 12, 8], [21, 4, 4, 60, 17, 90]])
ONES = torch.ones_like(REAL)


def wrapped(family: str, **kwargs: Any) -> Any:
    wrapper = AutoModelForSeq2SeqLMWithValueHead if family in SEQ2SEQ_FAMILIES else AutoModelForCausalLMWithValueHead
    return wrapper.from_pretrained(tiny_model(family), **kwargs)


def split_hidden(model: nn.Module, family: str) -> Tensor:
    if family in SEQ2SEQ_FAMILIES:
        return seq2seq_hidden_states(model, REAL, ONES, REAL.flip(1))
    return hidden_states(model, REAL, ONES, mask_positions(ONES))


def own_output(model: nn.Module, family: str) -> tuple[Tensor, Tensor | None, Tensor]:
    return model(
        REAL, attention_mask=ONES, **({"decoder_input_ids": REAL.flip(1)} if family in SEQ2SEQ_FAMILIES else {})
    )


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_split_gives_the_models_own_logits_values_and_gradients(family: str) -> None:
    model = wrapped(family)
    weights = torch.randn(*REAL.shape, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))

    hidden = split_hidden(model, family)
    logits = logits_at(lm_head(model), hidden)
    (logits * weights).sum().backward()
    split = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    own, _, value = own_output(model, family)
    (own * weights).sum().backward()
    whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    torch.testing.assert_close(logits, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.v_head(hidden).squeeze(-1), value, rtol=1e-5, atol=1e-5)
    assert split.keys() == whole.keys()
    assert len(split) > 5
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_check_split_accepts_every_family_plain_wrapped_and_with_an_adapter(family: str) -> None:
    check_split(tiny_model(family))
    check_split(wrapped(family))
    check_split(wrapped(family, peft_config=tiny_lora(family)))


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_chosen_positions_are_rows_of_all_positions(family: str) -> None:
    model = tiny_model(family)
    hidden = hidden_states(model, REAL, ONES, mask_positions(ONES))
    keep = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()
    everywhere = logits_at(lm_head(model), hidden)
    torch.testing.assert_close(logits_at(lm_head(model), hidden[keep]), everywhere[keep], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_real_tokens_alone(family: str, side: str) -> None:
    model = tiny_model(family)
    expected = hidden_states(model, REAL[:1, :4], ONES[:1, :4], mask_positions(ONES[:1, :4]))
    # Beside a longer neighbour, as in a batch; padding is EOS-like garbage in one case and pad in the other.
    ids, mask = REAL.repeat(2, 1), ONES.repeat(2, 1)
    for row, filler in ((0, PAD_ID), (2, 77)):
        padding = torch.full((2,), filler)
        parts = (padding, REAL[0, :4]) if side == "left" else (REAL[0, :4], padding)
        ids[row] = torch.cat(parts)
        mask[row] = (torch.arange(6) >= 2) if side == "left" else (torch.arange(6) < 4)
    hidden = hidden_states(model, ids, mask, mask_positions(mask))
    for row in (0, 2):
        torch.testing.assert_close(hidden[row][mask[row].bool()], expected[0], rtol=1e-5, atol=1e-5)
    assert hidden.isfinite().all()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_explicit_positions_are_really_passed(family: str) -> None:
    model = tiny_model(family)
    shifted = hidden_states(model, REAL, ONES, mask_positions(ONES) + 3)
    assert not torch.allclose(shifted, hidden_states(model, REAL, ONES, mask_positions(ONES)), atol=1e-3)


def test_seq2seq_padding_leaves_real_tokens_alone() -> None:
    model = tiny_model("t5")
    expected = seq2seq_hidden_states(model, REAL[:1, :4], ONES[:1, :4], REAL[1:, :3])
    for left in (True, False):
        padding = torch.full((1, 2), PAD_ID)
        ids = torch.cat((padding, REAL[:1, :4]) if left else (REAL[:1, :4], padding), dim=1)
        mask = (ids != PAD_ID).long()
        decoder = torch.cat((REAL[1:, :3], padding), dim=1)
        hidden = seq2seq_hidden_states(model, ids, mask, decoder)
        torch.testing.assert_close(hidden[:, :3], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "scale"),
    [(CohereConfig, 0.25), (GraniteConfig, 0.25)],
    ids=["cohere multiplies", "granite divides"],
)
def test_logit_scales_of_other_families(config: Any, scale: float) -> None:
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    scaling = {"logit_scale": scale} if config is CohereConfig else {"logits_scaling": 1 / scale}
    model = AutoModelForCausalLM.from_config(config(**shape, **scaling, bos_token_id=1)).eval()
    assert lm_head(model).scale == scale
    check_split(model)


def test_soft_cap_and_tied_scale_are_taken_into_account() -> None:
    assert lm_head(tiny_model("gemma2")).softcap == 2.0
    assert lm_head(tiny_model("t5")).scale == pytest.approx(16**-0.5)
    # Not by tie_word_embeddings=False: some releases of transformers take that for True.
    unscaled = tiny_model("t5")
    unscaled.config.scale_decoder_outputs = False
    assert lm_head(unscaled).scale == 1.0
    check_split(unscaled)


def test_half_precision_passes_the_check_and_gives_float32() -> None:
    model = tiny_model("gemma2").to(torch.bfloat16)
    check_split(model)
    assert logits_at(lm_head(model), split_hidden(model, "gemma2")).dtype == torch.float32
    double = tiny_model("llama").double()
    assert logits_at(lm_head(double), split_hidden(double, "llama")).dtype == torch.float64


def test_check_split_refuses_a_scale_it_does_not_know() -> None:
    model = tiny_model("llama")
    head = model.lm_head
    head.register_forward_hook(lambda module, args, output: 1.5 * output)
    with pytest.raises(SplitError, match=r"LlamaForCausalLM differ by .*this architecture is not supported.*report"):
        check_split(model)


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_adapters_on_the_head_are_refused_before_they_differ(target: str) -> None:
    """LoRA starts as the identity, so comparing logits at the start would prove nothing about later."""
    config = tiny_lora("llama", target_modules=[target])
    model = wrapped("llama", peft_config=config)
    if target == "q_proj":
        check_split(model)
        return
    with pytest.raises(SplitError, match=r"peft.*Linear.*leave the LM head out of the adapter"):
        check_split(model)


def test_a_trained_copy_of_the_head_is_followed() -> None:
    config = tiny_lora("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = wrapped("llama", peft_config=config)
    trained = lm_head(model).weight
    assert trained.requires_grad
    with torch.no_grad():
        trained.mul_(2)
    check_split(model)
    with reference_context(model):
        assert lm_head(model).weight.data_ptr() != trained.data_ptr()
        check_split(model)
    assert lm_head(model).weight.data_ptr() == trained.data_ptr()


def test_prompt_learning_is_refused() -> None:
    model = wrapped("gpt2", peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(SplitError, match=r"PROMPT_TUNING.*peft\.LoraConfig"):
        check_split(model)


def test_the_wrong_function_for_a_kind_of_model_names_the_right_one() -> None:
    with pytest.raises(ValueError, match="seq2seq_hidden_states"):
        hidden_states(tiny_model("t5"), REAL, ONES)
    with pytest.raises(ValueError, match="use hidden_states"):
        seq2seq_hidden_states(tiny_model("gpt2"), REAL, ONES, REAL)


def test_check_split_leaves_modes_alone() -> None:
    model = wrapped("gpt2").train()
    model.v_head.eval()
    check_split(model)
    assert model.training
    assert model.pretrained_model.training
    assert not model.v_head.training


def test_the_soft_cap_goes_by_another_name_in_recurrent_gemma() -> None:
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "attention_window_size": 8, "lru_width": 16, "logits_soft_cap": 0.5}
    model = AutoModelForCausalLM.from_config(RecurrentGemmaConfig(**shape, pad_token_id=0, eos_token_id=1)).eval()
    assert lm_head(model).softcap == 0.5
    check_split(model)


def test_a_head_of_another_kind_says_what_to_do() -> None:
    model = tiny_model("llama")
    model.lm_head = type("OtherLinear", (nn.Linear,), {})(16, VOCAB_SIZE)
    with pytest.raises(SplitError, match=r"OtherLinear.*not quantised.*report"):
        check_split(model)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_no_family_here_reads_padding(family: str) -> None:
    assert not reads_padding(tiny_model(family))


def test_a_compiled_model_inside_is_named() -> None:
    model = wrapped("llama")
    model.pretrained_model = torch.compile(model.pretrained_model, backend="eager")
    with pytest.raises(SplitError, match=r"torch\.compile"):
        check_split(model)
