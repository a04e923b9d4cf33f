"""A GGUF written from a known model, converted, must be that model again."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ppo_runtime.models.gguf import convert_gguf

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


VOCABULARY = [*SPECIALS, *alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def tiny_model(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.3,  # large enough that a wrong order of rows shows in the logits
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: within each head, row i of the first half and then row i of the second."""
    order = []
    size = len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            order += [head * size + i, head * size + size // 2 + i]
    return weight[order]


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    quantised: bool = False,
    extra: bool = False,
    left_out: str = "",
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write the model as llama.cpp would; with ``quantised``, layer 0's value and down projections become Q8_0,
    and the model given is changed to what those blocks stand for. ``left_out`` is a tensor, ``more`` are settings."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(VOCABULARY) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in more.items():
        writer.kv_data[0].pop(key, None)
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        if value is not None:
            add[type(value)](key, value)

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for full, parameter in model.named_parameters():
        name = full.removesuffix(".weight")
        weight = parameter.detach().numpy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            target = f"blk.{layer}.{names[rest]}.weight"
        else:
            target = f"{names[name]}.weight"
        if "q_proj" in name:
            weight = permute(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = permute(weight, config.num_key_value_heads)
        if target == left_out:
            continue
        if quantised and target in ("blk.0.attn_v.weight", "blk.0.ffn_down.weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quants.quantize(weight, kind)
            writer.add_tensor(target, blocks, raw_dtype=kind)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
        else:
            writer.add_tensor(target, weight)
    if extra:
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
def test_logits_are_those_of_the_model_that_was_written(tmp_path: Path, tied: bool, quantised: bool) -> None:
    original = tiny_model(tied=tied)
    convert_gguf(write_gguf(tmp_path / "m.gguf", original, quantised=quantised), tmp_path / "out")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert converted.dtype == torch.float32
    assert converted.config.tie_word_embeddings is tied
    tokens = torch.randint(len(VOCABULARY), (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(converted(tokens).logits, original(tokens).logits, atol=1e-5, rtol=1e-5)


def test_tokenizer_has_the_vocabulary_the_splitting_and_the_template(tmp_path: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "m.gguf", tiny_model(tied=True)), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("hello w12<|im_end|>")["input_ids"])
    assert pieces == ["hello", "Ġw", "1", "2", "<|im_end|>"]  # 1 and 2 stay apart although a merge joins them
    for text in ("naïve  café\n\t£3.50", "<|im_start|>hello<|im_end|>", " lead and trail "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>hello<|im_end|>"
    assert tokenizer.decode([1, 5, 2], skip_special_tokens=True) == tokenizer.decode([5])


def test_plain_byte_level_vocabulary_keeps_numbers_together(tmp_path: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "m.gguf", tiny_model(tied=True), pre="gpt-2"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("12")["input_ids"]) == ["12"]


def test_a_wheel_is_as_good_as_the_file_inside(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", tiny_model(tied=True))
    with zipfile.ZipFile(tmp_path / "model-1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(source, "model/m.gguf")
    convert_gguf(source, tmp_path / "a")
    convert_gguf(tmp_path / "model-1-py3-none-any.whl", tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_an_empty_output_is_filled_and_nothing_else_is_left(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", tiny_model(tied=True))
    (tmp_path / "out").mkdir()
    convert_gguf(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]


def test_a_full_output_is_refused_and_untouched(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", tiny_model(tied=True))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        convert_gguf(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2', supported: 'llama'"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm'"),
        ({"extra": True}, "unknown tensor rope_freqs.weight"),
        ({"left_out": "blk.1.ffn_up.weight"}, r"layers\.1\.mlp\.up_proj\.weight is missing"),
        ({"left_out": "output_norm.weight"}, r"model\.norm\.weight is missing"),
        ({"more": {"llama.block_count": 3}}, r"layers\.2\.\S* is missing"),
        (
            {"more": {"llama.block_count": 1}},
            r"layers\.1\.\S* is \(64,\), expected by its own settings: no such weight",
        ),
        ({"more": {"llama.feed_forward_length": 95}}, r"down_proj\.weight is \(64, 96\), expected .* \(64, 95\)"),
        ({"more": {"llama.context_length": None}}, "llama.context_length not given"),
        ({"more": {"llama.attention.layer_norm_rms_epsilon": None}}, "layer_norm_rms_epsilon not given"),
        (
            {"more": {"llama.rope.dimension_count": 8}},
            "llama.rope.dimension_count is 8, supported: 16, the size of a head",
        ),
        ({"more": {"llama.attention.value_length": 8}}, "value_length is 8, supported: 16, the size of a head"),
        ({"more": {"llama.rope.scale_linear": 2.0}}, r"scale_linear is 2\.0, supported: 1\.0"),
        ({"more": {"llama.attention.sliding_window": 8}}, "sliding_window is 8, supported: 0"),
        ({"more": {"llama.attention.head_count_kv": [2, 1]}}, r"head_count_kv is \[2, 1\], supported: one number"),
    ],
)
def test_unsupported_models_are_refused_by_name(tmp_path: Path, options: dict, message: str) -> None:
    source = write_gguf(tmp_path / "m.gguf", tiny_model(tied=True), **options)
    with pytest.raises(ValueError, match=message):
        convert_gguf(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]  # no half-made output, no scratch


def test_bad_sources_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ValueError, match="neither a GGUF file nor a wheel"):
        convert_gguf(tmp_path / "text.gguf", tmp_path / "out")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ValueError, match="can't be read as GGUF"):
        convert_gguf(tmp_path / "damaged.gguf", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("empty/__init__.py", "")
    with pytest.raises(ValueError, match=r"should hold one \.gguf file, but holds 0"):
        convert_gguf(tmp_path / "empty.whl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "m.gguf", tiny_model(tied=True))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'ppo-core\[convert\]'"):
        convert_gguf(source, tmp_path / "out")
