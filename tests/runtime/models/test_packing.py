"""Rows end to end have the states, gradients and losses that they have padded; models that mix them are found out."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    CTRLConfig,
    FalconConfig,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    MambaConfig,
    PhiConfig,
    RecurrentGemmaConfig,
)

from ppo_runtime.learning import forward
from ppo_runtime.learning.forward import Rows, evaluate, lay_out
from ppo_runtime.models import packing
from ppo_runtime.models.heads import hidden_states, mask_positions
from ppo_runtime.models.packing import (
    keeps_rows_apart,
    most_tokens_end_to_end,
    packed_hidden_states,
    packing_pays,
)
from ppo_runtime.models.wrapper import AutoModelForCausalLMWithValueHead
from tests.runtime.support.tiny import CAUSAL_FAMILIES, TOKENS, VOCAB_SIZE, tiny_config, tiny_lora, tiny_model
from tests.runtime.support.trainers import make_batch, make_trainer, untimed

LENGTHS = (3, 12, 1, 7)
# Windows that are shorter than rows, caps that bend what they cap, and every way to know positions.
# OPT makes its mask without looking at positions.
CASES: dict[str, dict[str, Any]] = {family: {} for family in CAUSAL_FAMILIES if family != "opt"} | {
    "a short window": {"family": "mistral", "sliding_window": 4},
    "low caps": {"family": "gemma2", "attn_logit_softcapping": 0.5, "attn_implementation": "eager"},
    "eager attention": {"family": "llama", "attn_implementation": "eager"},
}


def made(case: str) -> Any:
    fields = {"family": case} | CASES[case]
    implementation = fields.pop("attn_implementation", None)
    model = tiny_model(**fields)
    if implementation:
        model.set_attn_implementation(implementation)
    return model


def ragged(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, VOCAB_SIZE, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("adapter", [False, True], ids=["", "LoRA"])
@pytest.mark.parametrize("case", CASES)
def test_rows_end_to_end_are_rows_alone(case: str, adapter: bool) -> None:
    model = made(case)
    if adapter:
        model = peft.get_peft_model(model, tiny_lora(CASES[case].get("family", case), init_lora_weights=False)).eval()
    assert keeps_rows_apart(model)
    ids, mask = ragged()
    packed = packed_hidden_states(model, ids, mask).split(LENGTHS)
    for row, length, states in zip(ids, LENGTHS, packed, strict=True):
        alone = row[None, :length]
        expected = hidden_states(model, alone, torch.ones_like(alone), torch.arange(length)[None])[0]
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=VOCAB_SIZE, state_size=4),
        RecurrentGemmaConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=VOCAB_SIZE, intermediate_size=24
        ),
        BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=VOCAB_SIZE),
        tiny_config("opt"),
    ],
    ids=lambda config: config.model_type,
)
def test_what_runs_along_the_row_is_found_out(config: Any) -> None:
    torch.manual_seed(0)
    assert not keeps_rows_apart(AutoModelForCausalLM.from_config(config).eval())


def test_a_model_that_does_not_listen_is_found_out_whatever_else_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes position ids and attends to every row before; and one that fails."""
    model = tiny_model("llama")
    monkeypatch.setattr(packing, "takes_positions", lambda inner: True)
    whole = model.base_model.forward

    def deaf(attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        ids = inputs["input_ids"]
        return whole(attention_mask=torch.ones_like(ids) if attention_mask is None else attention_mask, **inputs)

    monkeypatch.setattr(model.base_model, "forward", deaf)
    assert not keeps_rows_apart(model)

    other = tiny_model("llama")

    def strict(attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        if attention_mask is None:
            raise ValueError("attention_mask is None, expected one")
        return whole(attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(other.base_model, "forward", strict)
    assert not keeps_rows_apart(other)


def test_a_model_is_tried_once_and_anew_with_another_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = tiny_model("llama"), []
    proved = packing._proved
    monkeypatch.setattr(packing, "_proved", lambda model: tried.append(1) or proved(model))
    assert all(keeps_rows_apart(one) for one in (model, AutoModelForCausalLMWithValueHead(model), model))
    assert len(tried) == 1
    model.set_attn_implementation("eager")
    assert keeps_rows_apart(model)
    assert len(tried) == 2
    assert all(not part.training for part in model.modules())


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    width=st.integers(1, 64),
)
def test_packing_pays_where_it_computes_less(lengths: list[int], width: int) -> None:
    """Counted layer by layer: multiplications of the linear maps, and of the attention over pairs."""

    def cost(rows: list[int]) -> int:
        return sum(24 * width * width * n + 4 * width * n * n for n in rows)

    assert packing_pays(lengths, width) == (cost([sum(lengths)]) < cost([max(lengths)] * len(lengths)))


def rows_of(lengths: tuple[tuple[int, int], ...]) -> Rows:
    generator = torch.Generator().manual_seed(2)
    draw = [[torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in pair] for pair in lengths]
    queries, responses = zip(*draw, strict=True)
    return lay_out(queries, responses, None, pad_token_id=0, decoder_start_token_id=None, device=torch.device("cpu"))


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_gradients_do_not_depend_on_the_layout(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)  # for the value head
    model = AutoModelForCausalLMWithValueHead(tiny_model(family))
    rows = rows_of(((2, 3), (9, 14), (1, 1)))
    found: list[dict[str, Tensor]] = []
    for packs in (True, False):
        monkeypatch.setattr(forward, "packing_pays", lambda *_, packs=packs: packs)
        model.zero_grad()
        now = evaluate(model, rows)
        assert now.values is not None
        weights = torch.arange(1.0, rows.mask.numel() + 1).view_as(rows.mask)
        (weights * (now.logprobs.exp() + now.values)).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        found[-1]["logprobs"] = now.logprobs.detach()
    packed, padded = found
    assert packed.keys() == padded.keys()
    for name, expected in padded.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(packed[name], expected, rtol=1e-4, atol=1e-5 * max(1.0, scale), msg=name)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_step_does_not_depend_on_the_layout(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = []
    for packs in (True, False):
        monkeypatch.setattr(forward, "packing_pays", lambda *_, packs=packs: packs)
        trainer = make_trainer(family)
        found.append(untimed(trainer.step(*make_batch())))
    for name, expected in found[1].items():
        torch.testing.assert_close(
            torch.as_tensor(found[0][name]), torch.as_tensor(expected), rtol=1e-3, atol=1e-5, msg=name, equal_nan=True
        )


def test_static_rows_keep_their_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "packed_hidden_states", None)
    monkeypatch.setattr(forward, "packing_pays", lambda *_: True)
    model = tiny_model("llama")
    evaluate(model, rows_of(((2, 3), (9, 14)))._replace(static=True))


def test_mask_positions_begin_anew_in_each_row() -> None:
    _, mask = ragged()
    assert mask_positions(mask)[mask.bool()].tolist() == [i for length in LENGTHS for i in range(length)]


_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.1}
_LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
# Those that keep masks or positions over their context, and their kin.
WITH_A_CONTEXT: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt_neo": (
        GPTNeoConfig,
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "gptj": (GPTJConfig, _GPT2 | {"rotary_dim": 4}),
    "codegen": (CodeGenConfig, _GPT2 | {"n_head": 4, "rotary_dim": 4}),
    "gpt_bigcode": (GPTBigCodeConfig, _GPT2),
    "ctrl": (CTRLConfig, _GPT2 | {"dff": 32}),
    "falcon": (FalconConfig, _LLAMA),
    "phi": (PhiConfig, _LLAMA | {"intermediate_size": 32}),
}


def with_a_context(family: str) -> Any:
    if family not in WITH_A_CONTEXT:
        return tiny_model(family)
    kind, fields = WITH_A_CONTEXT[family]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**(TOKENS | fields))).eval()


@pytest.mark.parametrize("family", [*WITH_A_CONTEXT, *CAUSAL_FAMILIES])
def test_rows_that_fit_the_context_are_read_however_many_there_are(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLMWithValueHead(with_a_context(family))
    rows = rows_of(((20, 20), (3, 10), (30, 30), (4, 3)))
    assert sum(rows.lengths) > 64
    alone = [evaluate(model, rows.select(torch.tensor([row]))) for row in range(4)]
    monkeypatch.setattr(forward, "packing_pays", lambda *_: True)
    together = evaluate(model, rows)
    for row, expected in enumerate(alone):
        time = expected.logprobs.shape[1]
        torch.testing.assert_close(together.logprobs[row, :time], expected.logprobs[0], rtol=1e-4, atol=1e-5)


def test_a_table_over_the_context_bounds_a_row_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_a_context("gpt_neo")
    assert most_tokens_end_to_end(model) == 64
    assert most_tokens_end_to_end(tiny_model("gpt2")) == float("inf")
    monkeypatch.setattr(forward, "packing_pays", lambda *_: True)
    assert forward._packs(model, rows_of(((20, 20), (10, 14))))
    assert not forward._packs(model, rows_of(((20, 20), (10, 15))))
