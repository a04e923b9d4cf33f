"""Tiny models, a tokenizer and datasets under the names that the old scripts load; directories in the current one."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

SENTENCES = (
    "This morning I went to the market and bought a good apple",
    "this is a test",
    "this is another, longer test",
    "This movie was really good and I liked it from the first minute to the last",
    "This movie was really bad and nobody should have to see how it ends",
    "Question: why is the sky blue? Answer: because of the air",
    "hello world, goodbye world",
)
VOCABULARY = 1024
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512},
    "gptj": {"n_embd": 32, "n_layer": 5, "n_head": 4, "rotary_dim": 4, "n_positions": 512},
    "codegen": {"n_embd": 32, "n_layer": 5, "n_head": 4, "rotary_dim": 4, "n_positions": 512},
    "gpt_neo": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    # The sizes whose numbers of parameters TRL's tests count.
    "gpt_neox": {
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 512,
    },
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "ffn_dim": 32,
        "max_position_embeddings": 512,
    },
    "bloom": {"hidden_size": 32, "n_layer": 5, "n_head": 4},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 1024,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 512},
    "roberta": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 514,
    },
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 128,
}
SHAPES |= {
    **dict.fromkeys(("t5", "mt5", "longt5", "switch_transformers"), _T5),
    **dict.fromkeys(
        ("bart", "mbart", "mvp", "pegasus", "pegasus_x", "plbart", "blenderbot", "blenderbot-small"), _BART
    ),
    **dict.fromkeys(("marian", "m2m_100", "bigbird_pegasus"), _BART),
    "led": _BART
    | {"attention_window": 8, "max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128},
    "prophetnet": {
        "hidden_size": 16,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 128,
    },
}
TESTS = "trl-internal-testing"
CAUSAL = {
    "CodeGenForCausalLM": "codegen",
    "GPTJForCausalLM": "gptj",
    "GPTNeoForCausalLM": "gpt_neo",
    "GPTNeoXForCausalLM": "gpt_neox",
    "OPTForCausalLM": "opt",
    "BloomForCausalLM": "bloom",
    "GPT2LMHeadModel": "gpt2",
    "CodeGenForCausalLM-sharded": "codegen",
    "GPTNeoXForCausalLM-safetensors-sharded": "gpt_neox",
    "GPTNeoXForCausalLM-safetensors": "gpt_neox",
}
SEQ2SEQ = {
    "BartForConditionalGeneration": "bart",
    "BigBirdPegasusForConditionalGeneration": "bigbird_pegasus",
    "BlenderbotForConditionalGeneration": "blenderbot",
    "BlenderbotSmallForConditionalGeneration": "blenderbot-small",
    "LEDForConditionalGeneration": "led",
    "LongT5ForConditionalGeneration": "longt5",
    "M2M100ForConditionalGeneration": "m2m_100",
    "MarianMTModel": "marian",
    "MBartForConditionalGeneration": "mbart",
    "MT5ForConditionalGeneration": "mt5",
    "MvpForConditionalGeneration": "mvp",
    "PegasusForConditionalGeneration": "pegasus",
    "PegasusXForConditionalGeneration": "pegasus_x",
    "PLBartForConditionalGeneration": "plbart",
    "ProphetNetForConditionalGeneration": "prophetnet",
    "SwitchTransformersForConditionalGeneration": "switch_transformers",
    "T5ForConditionalGeneration": "t5",
}


def make_all(folder: Path) -> None:
    """Everything that the scripts and tests load by name, below ``folder``."""
    torch.manual_seed(0)
    random.seed(0)
    tokenizer = _tokenizer(folder)
    judge = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    makers = AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
    causal, seq2seq, classifier = makers
    wanted: list[tuple[str, str, Any, dict[str, Any]]] = [
        *((name, "gpt2", causal, {}) for name in ("gpt2", "lvwerra/gpt2-imdb", f"{TESTS}/dummy-GPT2-correct-vocab")),
        (f"{TESTS}/tiny-BloomForCausalLM-correct-vocab", "bloom", causal, {}),
        (f"{TESTS}/tiny-T5ForConditionalGeneration-correct-vocab", "t5", seq2seq, {}),
        ("bigscience/bloom-560m", "bloom", causal, {"n_layer": 7}),
        ("huggyllama/llama-7b", "llama", causal, {}),
        ("ybelkada/gpt-j-6b-sharded-bf16", "gptj", causal, {}),
        ("edbeeching/gpt-neo-125M-imdb", "gpt_neo", causal, {}),
        ("lvwerra/distilbert-imdb", "distilbert", classifier, judge),
        ("reward-model", "llama", classifier, {"num_labels": 1}),
        ("facebook/roberta-hate-speech-dynabench-r4-target", "roberta", classifier, {}),
        *((f"{TESTS}/tiny-random-{name}", kind, causal, {}) for name, kind in CAUSAL.items()),
        *((f"{TESTS}/tiny-random-{name}", kind, seq2seq, {}) for name, kind in SEQ2SEQ.items()),
    ]
    for name, kind, maker, fields in wanted:
        model = maker.from_config(config_of(kind, **fields))
        shard = {"max_shard_size": "100KB"} if name.endswith("sharded") else {}
        model.save_pretrained(folder / name, **shard)
        # GPT-2's tokenizer has no padding token; those of classifiers have.
        tokenizer.pad_token = tokenizer.eos_token if maker is classifier else None
        tokenizer.save_pretrained(folder / name)
    for name, kind in (("GPT2Model", "gpt2"), ("T5Model", "t5")):
        AutoModel.from_config(config_of(kind)).save_pretrained(folder / TESTS / f"tiny-random-{name}")
    _reward_adapter(folder)
    _datasets(folder)


def config_of(kind: str, **fields: Any) -> Any:
    """A tiny configuration of a model type."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind not in ("gpt2", "bloom"):
        tokens |= {"decoder_start_token_id": 0} if kind in SEQ2SEQ.values() else {}
    return AutoConfig.for_model(kind, **(tokens | SHAPES[kind] | fields))


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which the words of :data:`SENTENCES` are one token each, as they are in GPT-2's."""
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(SENTENCES * 4, vocab_size=VOCABULARY, min_frequency=2, special_tokens=["<|endoftext|>"])
    end = "<|endoftext|>"
    (folder / "gpt2").mkdir(parents=True)
    for name in ("gpt2", "facebook/roberta-hate-speech-dynabench-r4-target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        trainer.save_model(str(folder / name))
    return PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        model_max_length=512,
    )


def _reward_adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForSequenceClassification.from_pretrained(str(folder / "huggyllama/llama-7b"), num_labels=2)
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2)).save_pretrained(
        folder / "trl-lib/llama-7b-hh-rm-adapter"
    )


def _datasets(folder: Path) -> None:
    def text(length: int) -> str:
        words = ""
        while len(words) < length:
            words += random.choice(SENTENCES) + ". "
        return words

    rows = {
        "imdb": [{"text": text(600), "label": index % 2} for index in range(8)],
        "Anthropic/hh-rlhf": [{"chosen": text(60), "rejected": text(60)} for _ in range(400)],
        "lvwerra/stack-exchange-paired/data/rl": [{"question": text(40)} for _ in range(8)],
        "Intel/orca_dpo_pairs": [{"system": "Help. ", "question": text(40)} for _ in range(8)],
        "HuggingFaceH4/cherry_picked_prompts": [{"prompt": text(20), "meta": "a", "completion": "b"} for _ in range(8)],
        "allenai/real-toxicity-prompts": [
            {"prompt": {"text": text(100), "toxicity": 0.5}, "continuation": {"text": text(200)}} for _ in range(8)
        ],
    }
    for name, records in rows.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.old_scripts.stand_ins", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to make them")
    make_all(parser.parse_args().folder)
