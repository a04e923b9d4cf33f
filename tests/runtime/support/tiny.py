"""Tiny random language models, made offline from configurations, and a tokenizer made in code.

Every family has the same vocabulary, so that one batch of token ids serves them all. Weights are drawn wide
(standard deviation 0.1 or so) because logits of a default initialisation are nearly uniform, and tests of
log-probabilities and entropies would then pass for many wrong formulas.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LEDConfig,
    LlamaConfig,
    LongT5Config,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    MistralConfig,
    MT5Config,
    OPTConfig,
    PegasusConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
    UMT5Config,
)

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SPECIAL = (PAD, EOS, UNK)
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)
PAD_ID, EOS_ID = 0, 1
TOKENS = {"pad_token_id": PAD_ID, "bos_token_id": EOS_ID, "eos_token_id": EOS_ID, "vocab_size": VOCAB_SIZE}

CAUSAL_FAMILIES = ("gpt2", "gpt_neox", "opt", "llama", "qwen2", "mistral", "gemma2")
T5_KIN = ("t5", "mt5", "umt5", "longt5")
BART_KIN = ("bart", "mbart", "pegasus", "marian", "led", "m2m_100")
SEQ2SEQ_FAMILIES = (*T5_KIN, *BART_KIN)
# One encoder-decoder for what is the same for all of them; `ALL_FAMILIES` where it may differ.
FAMILIES = (*CAUSAL_FAMILIES, "t5")
ALL_FAMILIES = (*CAUSAL_FAMILIES, *SEQ2SEQ_FAMILIES)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `decode` inverts `encode` exactly for printable ASCII."""
    vocab = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_config(family: str, *, dropout: float = 0.0, layers: int = 2, **overrides: Any) -> Any:
    """The configuration of a tiny model; `overrides` are the family's own configuration fields."""
    shape = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    gated = shape | {
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "attention_dropout": dropout,
        "initializer_range": 0.1,
    }
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": layers}
    t5 |= {"dropout_rate": dropout, "decoder_start_token_id": PAD_ID}
    bart: dict[str, Any] = {"d_model": 16, "encoder_layers": layers, "decoder_layers": layers}
    bart |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    bart |= {"dropout": dropout, "attention_dropout": dropout, "init_std": 0.3}
    # Given in full: the class's default is a token of another vocabulary, forced upon the end of every response.
    bart |= {"forced_eos_token_id": None, "decoder_start_token_id": EOS_ID}
    both_sides = {"max_position_embeddings": 64}
    makers: dict[str, tuple[Any, dict[str, Any]]] = {
        "gpt2": (
            GPT2Config,
            {"n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 64, "initializer_range": 0.1}
            | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        ),
        "gpt_neox": (
            GPTNeoXConfig,
            shape
            | {"intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.1}
            | {"hidden_dropout": dropout, "attention_dropout": dropout},
        ),
        # The projected embeddings of OPT-350m: hidden size and the width of the LM head differ.
        "opt": (
            OPTConfig,
            shape
            | {"ffn_dim": 32, "word_embed_proj_dim": 12, "max_position_embeddings": 64, "init_std": 0.3}
            | {"dropout": dropout, "attention_dropout": dropout},
        ),
        "llama": (LlamaConfig, gated),
        "qwen2": (Qwen2Config, gated),
        "mistral": (MistralConfig, gated | {"head_dim": 8}),
        # A low cap, so that leaving the soft cap out changes the logits visibly.
        "gemma2": (
            Gemma2Config,
            gated | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 2.0},
        ),
        "t5": (T5Config, t5),
        "mt5": (MT5Config, t5),
        "umt5": (UMT5Config, t5),
        # Blocks as short as these tests' prompts, so that where a row lies in them makes a difference.
        "longt5": (
            LongT5Config,
            t5 | {"encoder_attention_type": "transient-global", "local_radius": 3, "global_block_size": 4},
        ),
        "bart": (BartConfig, bart | both_sides),
        # Without a start token of its own: its decoder begins with BOS.
        "mbart": (MBartConfig, bart | both_sides | {"decoder_start_token_id": None}),
        "pegasus": (PegasusConfig, bart | both_sides | {"decoder_start_token_id": PAD_ID}),
        "marian": (MarianConfig, bart | both_sides | {"decoder_start_token_id": PAD_ID}),
        "led": (
            LEDConfig,
            bart
            | {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 32},
        ),
        "m2m_100": (M2M100Config, bart | both_sides),
    }
    if family not in makers:
        raise ValueError(f"family is {family!r}, expected one of {', '.join(ALL_FAMILIES)}")
    maker, fields = makers[family]
    return maker(**(TOKENS | fields | overrides))


def tiny_model(
    family: str = "gpt2", *, seed: int = 0, dropout: float = 0.0, layers: int = 2, **overrides: Any
) -> PreTrainedModel:
    """A tiny random model in eval mode, the same for the same arguments; the global generator is untouched."""
    config = tiny_config(family, dropout=dropout, layers=layers, **overrides)
    parent = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = parent.from_config(config)
        # The bias of BART's kin is a buffer of zeros until a checkpoint fills it.
        if isinstance(bias := getattr(model, "final_logits_bias", None), torch.Tensor):
            bias.normal_()
    return model.eval()


def tiny_lora(family: str = "gpt2", **fields: Any) -> Any:
    """A LoRA configuration over the linear layers of a family's trunk."""
    from peft import LoraConfig

    task = "SEQ_2_SEQ_LM" if family in SEQ2SEQ_FAMILIES else "CAUSAL_LM"
    defaults = {"r": 2, "target_modules": "all-linear", "fan_in_fan_out": family == "gpt2"}
    return LoraConfig(task_type=task, **(defaults | fields))
