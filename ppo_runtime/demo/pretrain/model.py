"""The tokenizer and the model that are trained, and how they are written down for the demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY, CONTEXT = 4096, 256


def train_tokenizer(paragraphs: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text has an encoding, and decoding gives it back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA of 3.4 million parameters with fresh weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.backend_tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.backend_tokenizer.token_to_id(PAD),
        )
    )


def regularise(model: LlamaForCausalLM, rate: float) -> None:
    """Dropout on what each attention and MLP block adds to the residual stream, which LLaMA itself lacks."""
    layers: Any = model.model.layers
    for layer in layers:
        layer.self_attn.o_proj.register_forward_hook(lambda m, _, out: F.dropout(out, rate, m.training))
        layer.mlp.down_proj.register_forward_hook(lambda m, _, out: F.dropout(out, rate, m.training))


def export(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[dict[str, str]], output: Path
) -> None:
    """Write the model in half precision, the tokenizer and the prompts."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in prompts)
    (output / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
