"""Value-head models: their contract, their files, and the modes they run in."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from ppo_runtime.models.modes import dropout_off, without_dropout
from ppo_runtime.models.wrapper import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from tests.runtime.support.tiny import CAUSAL_FAMILIES, FAMILIES, VOCAB_SIZE, tiny_lora, tiny_model


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)  # for the value heads; `tiny_model` has a seed of its own


IDS = torch.tensor([[5, 9, 33, 70], [21, 4, 4, 60]])


def wrapper(family: str) -> Any:
    return AutoModelForSeq2SeqLMWithValueHead if family == "t5" else AutoModelForCausalLMWithValueHead


def wrapped(family: str = "gpt2", dropout: float = 0.0, **kwargs: Any) -> Any:
    model = wrapper(family).from_pretrained(tiny_model(family, dropout=dropout), **kwargs)
    nn.init.normal_(model.v_head.summary.bias)  # so that a lost bias shows
    return model


def outputs(model: nn.Module, family: str = "gpt2") -> Any:
    more = {"decoder_input_ids": IDS.flip(1)} if family == "t5" else {}
    return model(IDS, attention_mask=torch.ones_like(IDS), **more)


def assert_same(one: nn.Module, other: nn.Module, family: str = "gpt2") -> None:
    with torch.no_grad():
        for a, b in zip(outputs(one, family), outputs(other, family), strict=True):
            assert a is None is b or torch.equal(a, b)


# --- forward and generate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_gives_logits_loss_and_a_value_per_token(family: str) -> None:
    model = wrapped(family).to(torch.bfloat16)
    logits, loss, value = outputs(model, family)
    assert logits.shape == (2, 4, VOCAB_SIZE)
    assert value.shape == (2, 4)
    assert logits.dtype == value.dtype == torch.float32
    assert loss is None
    labels = {"labels": IDS} if family != "t5" else {"labels": IDS, "decoder_input_ids": IDS}
    _, loss, _ = model(IDS, attention_mask=torch.ones_like(IDS), **labels)
    assert loss.ndim == 0


def test_values_are_computed_in_float32_under_autocast() -> None:
    model = wrapped()
    hidden = torch.randn(2, 3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, value = model.v_head.summary(hidden), model.v_head(hidden)
    assert plain.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    assert torch.equal(value, model.v_head.summary(hidden))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_cache_may_be_passed_by_either_name(family: str, name: str) -> None:
    model = wrapped(family)
    whole = outputs(model)
    given: Any = {name: transformers.DynamicCache(config=model.config)}
    mask = torch.ones_like(IDS)
    first = model(IDS[:, :3], attention_mask=mask[:, :3], use_cache=True, **given)
    last = model(IDS[:, 3:], attention_mask=mask, use_cache=True, **given)
    for index in (0, 2):
        torch.testing.assert_close(torch.cat((first[index], last[index]), 1), whole[index], rtol=1e-4, atol=1e-4)


def test_an_encoder_decoders_cache_goes_to_its_decoder() -> None:
    model = wrapped("t5")
    whole = outputs(model, "t5")
    config = model.config
    cache = transformers.EncoderDecoderCache(*(transformers.DynamicCache(config=config) for _ in range(2)))
    ids, parts = IDS.flip(1), []
    for start, stop in ((0, 3), (3, 4)):
        parts.append(model(IDS, decoder_input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True))
    for index in (0, 2):
        torch.testing.assert_close(torch.cat([part[index] for part in parts], 1), whole[index], rtol=1e-4, atol=1e-4)


class OlderModel(transformers.GPT2LMHeadModel):
    """As a model of an earlier release, or of a repository's own code: it knows `past_key_values` alone."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        assert "cache" not in kwargs
        self.seen = past_key_values
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_model_is_given_its_cache_by_the_name_that_it_knows(name: str) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(OlderModel(tiny_model().config).eval())
    cache = transformers.DynamicCache(config=model.config)
    model(IDS, **{name: cache})
    assert model.pretrained_model.seen is cache


def test_two_caches_are_one_too_many() -> None:
    cache = transformers.DynamicCache()
    with pytest.raises(ValueError, match="both cache and past_key_values"):
        wrapped()(IDS, past_key_values=cache, cache=cache)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_generate_delegates(family: str) -> None:
    model = wrapped(family)
    arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False}
    own = model.pretrained_model.generate(input_ids=IDS, **arguments)
    assert torch.equal(model.generate(input_ids=IDS, **arguments), own)


def test_small_properties() -> None:
    model = wrapped("t5")
    assert model.is_encoder_decoder
    assert not model.is_peft_model
    assert model.config.model_type == "t5"
    assert model.device.type == "cpu"
    adapted = wrapped(peft_config=tiny_lora())
    assert adapted.is_peft_model
    for decoder_only in (wrapped(), adapted):
        assert not hasattr(decoder_only, "is_encoder_decoder"), "environments of old scripts ask by hasattr"
    assert adapted.config.model_type == "gpt2"


# --- the head ------------------------------------------------------------------------------------------------


def test_head_arguments() -> None:
    model = wrapped(summary_dropout_prob=0.3, v_head_init_strategy="normal", v_head_initializer_range=5.0)
    assert model.v_head.dropout.p == 0.3
    assert 2.0 < model.v_head.summary.weight.std() < 9.0
    assert wrapped().v_head.dropout.p == 0.1
    assert isinstance(wrapped(summary_dropout_prob=0.0).v_head.dropout, nn.Identity)
    assert wrapped("opt").v_head.summary.in_features == 12, "OPT's head reads the projection, not the hidden size"
    normal = wrapper("gpt2").from_pretrained(tiny_model(), v_head_init_strategy="normal")
    assert normal.v_head.summary.bias.item() == 0.0
    still = wrapped(v_head_init_strategy="normal", v_head_initializer_range=0)
    assert not still.v_head.summary.weight.any()
    with pytest.raises(ValueError, match="v_head_init_strategy is 'uniform', expected 'normal' or None"):
        wrapped(v_head_init_strategy="uniform")
    for name, odd in (("summary_dropout_prob", 2), ("summary_dropout_prob", "0.1"), ("v_head_initializer_range", -1)):
        with pytest.raises(ValueError, match=f"{name} is {odd!r}, expected a number from 0"):
            wrapped(**{"v_head_init_strategy": "normal", name: odd})
    with pytest.raises(ValueError, match="v_head_initializer_range is nan, expected"):
        wrapped(v_head_init_strategy="normal", v_head_initializer_range=float("nan"))


def test_the_head_is_in_the_mode_of_the_model() -> None:
    assert not wrapped().v_head.training
    assert wrapper("gpt2").from_pretrained(tiny_model().train()).v_head.training
    adapted = wrapped(peft_config=tiny_lora(lora_dropout=0.5))
    assert not any(part.training for part in adapted.modules()), "nor is a new adapter's dropout on"


# --- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    model = wrapped(family)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "value_head.safetensors")) == {"v_head.summary.weight", "v_head.summary.bias"}
    assert not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.pt")]
    assert_same(model, wrapper(family).from_pretrained(tmp_path), family)
    assert_same(model, wrapper(family).from_pretrained(str(tmp_path), dtype=torch.float32), family)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Any:
    """What transformers logs; its logger does not propagate by default."""
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    caplog.set_level(logging.WARNING, logger="transformers")
    yield caplog
    logger.propagate = propagate


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_plain_transformers_loads_our_directory_without_a_word(family: str, tmp_path: Path, log: Any) -> None:
    model = wrapped(family)
    model.save_pretrained(tmp_path)
    parent = wrapper(family).transformers_parent_class
    plain, report = parent.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert "value_head" not in log.text
    assert "v_head" not in log.text
    for name, value in model.pretrained_model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)


def test_saving_a_given_state_dict(tmp_path: Path) -> None:
    model = wrapped()
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = wrapper("gpt2").from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("adapted", [False, True])
def test_a_state_dict_without_a_head_goes_with_the_models_own(adapted: bool, tmp_path: Path) -> None:
    """Such as the inner model's, gathered from many processes."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = wrapper("gpt2").from_pretrained(tmp_path / "base", **({"peft_config": tiny_lora()} if adapted else {}))
    state = {name: value + 1 for name, value in model.pretrained_model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=state)
    loaded = wrapper("gpt2").from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(loaded.v_head.parameters(), model.v_head.parameters(), strict=True))
    for name, parameter in loaded.named_parameters():
        if parameter.requires_grad and not name.startswith("v_head."):
            assert torch.equal(parameter, state[name.removeprefix("pretrained_model.")]), name


HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "half of it": ({"v_head.summary.weight": torch.zeros(1, 16)}, r"v_head\.summary\.bias is missing"),
    "another width": (
        {"v_head.summary.weight": torch.zeros(1, 3), "v_head.summary.bias": torch.zeros(1)},
        r"v_head\.summary\.weight has the shape \(1, 3\), not \(1, 16\)",
    ),
    "another head": (
        {"v_head.0.weight": torch.zeros(16, 16)},
        r"v_head\.summary\.weight is missing, .*bias is missing, v_head\.0\.weight is unknown",
    ),
    "whole numbers": (
        {"v_head.summary.weight": torch.zeros(1, 16).long(), "v_head.summary.bias": torch.zeros(1)},
        r"v_head\.summary\.weight is a torch\.int64, not a tensor of floating-point numbers",
    ),
}


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("door", ["its file", "the model's file", "state_dict"])
def test_a_head_that_does_not_fit_is_named(door: str, case: str, tmp_path: Path) -> None:
    model, (head, problem) = wrapped(), HEADS[case]
    if door == "state_dict":
        with pytest.raises(ValueError, match=f"^state_dict holds no value head of this model.*{problem}"):
            model.save_pretrained(tmp_path / "new", state_dict=model.pretrained_model.state_dict() | head)
        assert not (tmp_path / "new").exists(), "refused before anything is written"
        return
    model.save_pretrained(tmp_path)
    file = tmp_path / "value_head.safetensors"
    if door == "the model's file":
        file.unlink()
        file = tmp_path / "model.safetensors"
        head = load_file(file) | head
    save_file(head, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} holds no value head of this model.*{problem}"):
        wrapper("gpt2").from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("given", "adapted"),
    [
        *(("nothing", adapted) for adapted in (False, True)),
        *(("the head alone", adapted) for adapted in (False, True)),
        ("names of another wrapping", False),  # of an adapter's peft picks what it knows
    ],
)
def test_a_state_dict_without_the_model_is_refused(given: str, adapted: bool, tmp_path: Path) -> None:
    model = wrapped(**({"peft_config": tiny_lora()} if adapted else {}))
    head = {name: value for name, value in model.state_dict().items() if name.startswith("v_head.")}
    state = {"nothing": {}, "the head alone": head, "names of another wrapping": {"module.lm.weight": torch.zeros(1)}}
    with pytest.raises(ValueError, match=r"state_dict holds none of the \d+ weights of .*such as '"):
        model.save_pretrained(tmp_path / "new", state_dict=state[given])
    assert not (tmp_path / "new").exists()
    # Where others hold the weights, this process may have been given nothing, or a part.
    for part in ({}, dict([*head.items()][:1])):
        model.save_pretrained(tmp_path / "rank", state_dict=part, is_main_process=False)
    assert not (tmp_path / "rank" / "value_head.safetensors").exists()


def test_a_file_is_no_directory_to_save_to(tmp_path: Path) -> None:
    (tmp_path / "policy").touch()
    with pytest.raises(NotADirectoryError, match="policy' is a file, expected a directory"):
        wrapped().save_pretrained(tmp_path / "policy")


@pytest.mark.parametrize("lost", ["one", "two"])
@pytest.mark.parametrize("layout", ["wrapped safetensors sharded", "wrapped bin sharded"])
def test_a_shard_that_is_not_there_is_named(layout: str, lost: str, tmp_path: Path) -> None:
    """Not made up: transformers would initialise what it does not find."""
    legacy_layout(tmp_path, "gpt2", layout)
    (shard,) = tmp_path.glob(f"*-{lost}.*")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"index\.json names {re.escape(shard.name)}, which .* does not hold"):
        wrapper("gpt2").from_pretrained(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize("content", [b"", b"odd", POINTER])
@pytest.mark.parametrize(
    "name",
    ["value_head.safetensors", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"],
)
def test_a_torn_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    remedy = "git lfs pull" if content is POINTER else "copy it anew"
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))} can't be read \((?s:.*){remedy}"):
        wrapper("gpt2").from_pretrained(tmp_path)


def legacy_layout(directory: Path, family: str, layout: str) -> Any:
    """A checkpoint with the head among the model's weights; returns the model it was made from."""
    model = wrapped(family)
    model.pretrained_model.save_pretrained(directory)
    inner = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if "wrapped" in layout:
        inner = {f"pretrained_model.{name}": value for name, value in inner.items()}
    head = {f"v_head.{name}": value for name, value in model.v_head.state_dict().items()}
    if "sharded" in layout:
        shards, total = {"one": inner, "two": head}, 1
    else:
        shards, total = {"all": inner | head}, 0
    suffix = "bin" if "bin" in layout else "safetensors"
    stem = "pytorch_model" if "bin" in layout else "model"
    weight_map = {}
    for shard, weights in shards.items():
        file = f"{stem}-{shard}.{suffix}" if total else f"{stem}.{suffix}"
        weight_map |= dict.fromkeys(weights, file)
        if suffix == "bin":
            torch.save(weights, directory / file)
        else:
            save_file(weights, directory / file, metadata={"format": "pt"})
    if total:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return model


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize(
    "layout",
    [
        f"{names}{kind}{shards}"
        for names in ("", "wrapped ")
        for kind in ("bin", "safetensors")
        for shards in ("", " sharded")
    ],
)
def test_layouts_users_have(family: str, layout: str, tmp_path: Path) -> None:
    model = legacy_layout(tmp_path / "old", family, layout)
    loaded = wrapper(family).from_pretrained(tmp_path / "old")
    assert_same(model, loaded, family)
    field = "resid_pdrop" if family == "gpt2" else "dropout_rate"
    other = wrapper(family).from_pretrained(tmp_path / "old", **{field: 0.25})
    assert getattr(other.config, field) == 0.25, "a field of the configuration, as transformers takes it"
    assert_same(model, other, family)
    loaded.save_pretrained(tmp_path / "new")
    assert_same(model, wrapper(family).from_pretrained(tmp_path / "new"), family)
    assert not any(name.startswith("pretrained") for name in load_file(tmp_path / "new" / "model.safetensors"))


def test_the_base_of_an_adapter_may_be_in_any_layout_and_lends_its_head(tmp_path: Path) -> None:
    """Transformers would initialise the weights whose names it does not know, and say so in a table at most."""
    for layout in ("wrapped safetensors", "wrapped bin sharded", "safetensors"):
        model = legacy_layout(tmp_path / layout, "gpt2", layout)
        adapted = peft.get_peft_model(tiny_model(seed=1), tiny_lora(init_lora_weights=False))
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / layout)
        adapted.save_pretrained(str(tmp_path / "adapter"))
        loaded = wrapper("gpt2").from_pretrained(tmp_path / "adapter")
        with loaded.pretrained_model.disable_adapter():
            assert_same(model, loaded)
        # A head of the adapter's own comes first.
        nn.init.normal_(loaded.v_head.summary.weight)
        loaded.save_pretrained(tmp_path / "mine")
        again = wrapper("gpt2").from_pretrained(tmp_path / "mine")
        assert torch.equal(again.v_head.summary.weight, loaded.v_head.summary.weight)


def test_the_older_layout_without_a_head_is_read_as_well(tmp_path: Path) -> None:
    model = legacy_layout(tmp_path, "gpt2", "wrapped safetensors")
    file = tmp_path / "model.safetensors"
    inner = {name: value for name, value in load_file(file).items() if not name.startswith("v_head.")}
    save_file(inner, file, metadata={"format": "pt"})
    loaded = wrapper("gpt2").from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded)[0], outputs(model)[0])


def test_loading_arguments_reach_transformers_in_every_layout(tmp_path: Path) -> None:
    for layout in ("safetensors", "wrapped safetensors"):
        legacy_layout(tmp_path / layout, "gpt2", layout)
        loaded = wrapper("gpt2").from_pretrained(tmp_path / layout, dtype=torch.bfloat16, attn_implementation="eager")
        assert loaded.pretrained_model.dtype == torch.bfloat16
        assert loaded.config._attn_implementation == "eager"
        assert loaded.v_head.summary.weight.dtype == torch.float32
        assert loaded.pretrained_model.name_or_path == str(tmp_path / layout)


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_configuration_may_be_the_path_of_one(kind: Any, with_head: bool, tmp_path: Path) -> None:
    """And is what the model then has, whether or not a head is stored beside it."""
    model = wrapped()
    (model if with_head else model.pretrained_model).save_pretrained(tmp_path / "model")
    changed = transformers.AutoConfig.from_pretrained(tmp_path / "model", layer_norm_epsilon=0.25)
    changed.save_pretrained(tmp_path / "config")
    again = wrapper("gpt2").from_pretrained(tmp_path / "model", config=kind(tmp_path / "config"))
    assert again.config.layer_norm_epsilon == 0.25
    encoder_decoder = tiny_model("t5").config
    encoder_decoder.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        wrapper("gpt2").from_pretrained(tmp_path / "model", config=kind(tmp_path / "other"))


def test_a_directory_without_a_head_gets_a_fresh_one(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = wrapper("gpt2").from_pretrained(tmp_path, v_head_init_strategy="normal")
    assert model.v_head.summary.bias.item() == 0.0


# --- state dicts ---------------------------------------------------------------------------------------------


def test_state_dict_is_the_inner_models_and_the_heads() -> None:
    model = wrapped()
    state = model.state_dict()
    assert set(state) == {*model.pretrained_model.state_dict(), "v_head.summary.weight", "v_head.summary.bias"}
    for given in (state, {k if k.startswith("v_head.") else f"pretrained_model.{k}": v for k, v in state.items()}):
        other = wrapper("gpt2").from_pretrained(tiny_model(seed=1))
        result = other.load_state_dict(given)
        assert not result.missing_keys
        assert_same(model, other)


def test_state_dict_inside_another_module_and_strictness() -> None:
    model = wrapped()
    outer = nn.ModuleDict({"module": model})
    state = outer.state_dict()
    assert "module.v_head.summary.bias" in state
    assert "module.transformer.wte.weight" in state
    other = nn.ModuleDict({"module": wrapper("gpt2").from_pretrained(tiny_model(seed=1))})
    other.load_state_dict(state)
    assert_same(model, other["module"])
    with pytest.raises(RuntimeError, match="surprise"):
        model.load_state_dict({**model.state_dict(), "surprise": torch.zeros(1)})


# --- PEFT ----------------------------------------------------------------------------------------------------


def trained_adapter(tmp_path: Path) -> Any:
    tiny_model().save_pretrained(tmp_path / "base")
    model = wrapper("gpt2").from_pretrained(tmp_path / "base", peft_config=tiny_lora())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model


def test_adapter_and_head_travel_together(tmp_path: Path) -> None:
    model = trained_adapter(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "value_head.safetensors"} <= files
    assert "model.safetensors" not in files

    loaded = wrapper("gpt2").from_pretrained(tmp_path / "adapter")
    assert loaded.is_peft_model
    assert_same(model, loaded)
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert names[0] == names[1]
    frozen = wrapper("gpt2").from_pretrained(tmp_path / "adapter", is_trainable=False)
    assert not any(p.requires_grad for p in frozen.pretrained_model.parameters())

    plain = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(plain(IDS).logits, outputs(model)[0])


@pytest.mark.parametrize("others", [[], ["default"]])
def test_an_adapter_of_another_name_travels_with_its_head_too(others: list[str], tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    names = [*others, "mine"]
    adapted: Any = peft.get_peft_model(base, tiny_lora(init_lora_weights=False), adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, tiny_lora(init_lora_weights=False))
    adapted.set_adapter("mine")
    model = wrapper("gpt2").from_pretrained(adapted)
    model.save_pretrained(tmp_path / "saved")
    assert_same(model, wrapper("gpt2").from_pretrained(tmp_path / "saved" / "mine"))
    if not others:
        with pytest.raises(ValueError, match=r"holds no model, but PEFT adapters in \S*saved/mine; load one of these"):
            wrapper("gpt2").from_pretrained(tmp_path / "saved")


def test_head_beside_an_adapter_in_the_older_layout(tmp_path: Path) -> None:
    model = trained_adapter(tmp_path)
    model.pretrained_model.save_pretrained(tmp_path / "adapter")
    head = {f"v_head.{name}": value for name, value in model.v_head.state_dict().items()}
    torch.save(head, tmp_path / "adapter" / "pytorch_model.bin")
    assert_same(model, wrapper("gpt2").from_pretrained(tmp_path / "adapter"))


def test_peft_state_dict_round_trip(tmp_path: Path) -> None:
    model = trained_adapter(tmp_path)
    other = wrapper("gpt2").from_pretrained(tmp_path / "base", peft_config=tiny_lora())
    other.load_state_dict(model.state_dict())
    assert_same(model, other)


def test_an_adapter_without_a_base_model_says_what_to_do(tmp_path: Path) -> None:
    wrapped(peft_config=tiny_lora()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"names no base model.*base_model_name_or_path"):
        wrapper("gpt2").from_pretrained(tmp_path)


def test_a_peft_model_may_be_wrapped_but_not_adapted_twice() -> None:
    adapted = peft.get_peft_model(tiny_model(), tiny_lora())
    assert wrapper("gpt2").from_pretrained(adapted).is_peft_model
    with pytest.raises(ValueError, match="already has a PEFT adapter"):
        wrapper("gpt2").from_pretrained(adapted, peft_config=tiny_lora())


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_lora()
    monkeypatch.setitem(sys.modules, "peft", None)
    assert not wrapped().is_peft_model
    with pytest.raises(ImportError, match=r"ppo-core\[peft\]"):
        wrapped(peft_config=config)


# --- wrong models --------------------------------------------------------------------------------------------


def test_the_wrong_kind_of_model_is_named_with_the_right_wrapper(tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path)
    for source in (tmp_path, tiny_model("t5")):
        with pytest.raises(ValueError, match=r"'t5'\) is an encoder-decoder.*use AutoModelForSeq2SeqLMWithValueHead"):
            AutoModelForCausalLMWithValueHead.from_pretrained(source)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel .*decoder-only.*use AutoModelForCausalLMWithValueHead"):
        AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_model())


def test_a_model_without_an_lm_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GPT2Model has no language-model head.*AutoModelForCausalLM"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model().transformer)


def test_things_that_are_no_models() -> None:
    with pytest.raises(TypeError, match="is a int, expected a name"):
        AutoModelForCausalLMWithValueHead.from_pretrained(3)
    with pytest.raises(TypeError, match="got a Linear, expected"):
        AutoModelForCausalLMWithValueHead(nn.Linear(2, 2))
    for door in (AutoModelForCausalLMWithValueHead, AutoModelForCausalLMWithValueHead.from_pretrained):
        with pytest.raises(
            TypeError, match="got a AutoModelForCausalLMWithValueHead, which has its value head already"
        ):
            door(wrapped())
    with pytest.raises(TypeError, match="already loaded takes no loading arguments, got dtype;"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model(), dtype=torch.bfloat16, trust_remote_code=True)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("name", ["/no/such/directory", "./no/such/directory", "no/such directory", "a file", ""])
def test_a_path_that_leads_nowhere_is_no_failing_connection(
    name: str, offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    what = "is a file" if name == "a file" else "is no directory here"
    with pytest.raises(OSError, match=rf"^'{name}' {what}, and no name of a repository on the hub.*check the path"):
        AutoModelForCausalLMWithValueHead.from_pretrained(name)


def test_a_path_that_could_be_a_repository_is_named_as_a_path_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"there is no directory 'runs/policy' here, and no repository of that name"):
        AutoModelForCausalLMWithValueHead.from_pretrained("runs/policy")


def test_the_base_of_an_adapter_that_moved_is_named_with_the_adapter(tmp_path: Path) -> None:
    trained_adapter(tmp_path).save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(
        OSError, match=rf"adapter' holds a PEFT adapter whose base model, '{tmp_path}/base' .*_name_or_"
    ):
        wrapper("gpt2").from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("arguments", [{"torch_dtype": None}, {"dtype": None}, {"load_in_8bit": False}])
def test_a_loaded_model_takes_arguments_that_ask_for_nothing(arguments: dict[str, Any]) -> None:
    model = tiny_model()
    arguments |= {"device_map": None, "config": None, "output_loading_info": False}
    assert wrapper("gpt2").from_pretrained(model, **arguments).pretrained_model is model
    with pytest.raises(TypeError, match="takes no loading arguments, got load_in_4bit;"):
        wrapper("gpt2").from_pretrained(model, load_in_4bit=True, **arguments)


@pytest.mark.parametrize("source", ["directory", "model"])
def test_a_report_of_loading_is_refused_by_name(source: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    given: Any = tmp_path if source == "directory" else tiny_model()
    with pytest.raises(ValueError, match=r"output_loading_info is True.*transformers\.AutoModelForCausalLM"):
        wrapper("gpt2").from_pretrained(given, output_loading_info=True)
    wrapper("gpt2").from_pretrained(given, output_loading_info=False)


# --- modes ---------------------------------------------------------------------------------------------------


def test_dropout_off_restores_every_flag() -> None:
    model = wrapped(dropout=0.5).train()
    model.pretrained_model.transformer.h[0].eval()
    before = {name: part.training for name, part in model.named_modules()}
    with dropout_off(model):
        assert not any(part.training for part in model.modules())
    assert {name: part.training for name, part in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="in the middle"), dropout_off(model):
        raise RuntimeError("in the middle")
    assert {name: part.training for name, part in model.named_modules()} == before


@pytest.mark.parametrize("family", FAMILIES)
def test_without_dropout_is_eval_in_training_mode(family: str) -> None:
    model = wrapped(family, dropout=0.5, summary_dropout_prob=0.5).train()
    with torch.no_grad():
        with dropout_off(model):
            expected = outputs(model, family)
        with without_dropout(model):
            assert all(part.training for part in model.modules())
            inside = outputs(model, family)
        torch.manual_seed(0)
        after = outputs(model, family)
    for index in (0, 2):
        torch.testing.assert_close(inside[index], expected[index], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(after[index], expected[index], atol=1e-3), "dropout must be back"


def norm_runs(model: nn.Module) -> list[None]:
    """Grows by one whenever a norm inside the second layer, and so inside its checkpoint, runs."""
    runs: list[None] = []
    layer = next(part for name, part in model.named_modules() if name.endswith((".h.1", "layers.1", "block.1")))
    norm = next(part for name, part in layer.named_modules() if name.endswith("norm") or "ln_1" in name)
    norm.register_forward_hook(lambda *_: runs.append(None))
    return runs


def gradients(model: nn.Module, family: str) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    logits, _, value = outputs(model, family)
    (logits.square().sum() + value.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_is_active_and_changes_no_gradient(family: str, adapter: bool) -> None:
    more = {"peft_config": tiny_lora(family, lora_dropout=0.5)} if adapter else {}
    model = wrapped(family, dropout=0.5, **more).train().double()
    runs = norm_runs(model)
    with without_dropout(model):
        plain = gradients(model, family)
        once = len(runs)
        model.gradient_checkpointing_enable()
        checkpointed = gradients(model, family)
        assert len(runs) == 3 * once, "a checkpointed layer runs again in backward"
        model.gradient_checkpointing_disable()
        gradients(model, family)
        assert len(runs) == 4 * once
    assert len(plain) > 5
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def test_in_eval_mode_gradient_checkpointing_would_be_off() -> None:
    """The defect `without_dropout` avoids: no dropout by `eval()` silently costs the memory back."""
    model = wrapped(dropout=0.5).train()
    model.gradient_checkpointing_enable()
    runs = norm_runs(model)
    with dropout_off(model):
        gradients(model, "gpt2")
    assert len(runs) == 1


def test_backward_belongs_inside_without_dropout() -> None:
    """Outside, the recomputation drops units again: the docstring's warning, as a fact."""
    model = wrapped(dropout=0.5).train()
    model.gradient_checkpointing_enable()
    with without_dropout(model):
        logits, _, value = outputs(model)
    with pytest.raises(CheckpointError):
        (logits.square().sum() + value.sum()).backward()
