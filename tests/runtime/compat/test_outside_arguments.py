"""What scripts bring along from elsewhere: other architectures, optimisers, older arguments, dictionaries."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Adafactor, AutoModelForCausalLM, MambaConfig, RwkvConfig

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from tests.runtime.support.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch, make_trainer

PLAIN: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "return_prompt": False}


def recurrent(config: type, **settings: Any) -> PPOTrainer:
    fields: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    fields |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    fields |= {"attention_hidden_size": 16, "context_length": 64} if config is RwkvConfig else {"state_size": 4}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config(**fields))
    with torch.no_grad():
        for parameter in base.parameters():  # RWKV begins so flat that padding hardly shows
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base)
    return PPOTrainer(PPOConfig(**(SETTINGS | settings)), model, None, tiny_tokenizer())


@pytest.mark.parametrize("config", [RwkvConfig, MambaConfig])
def test_recurrent_models_answer_each_query_as_if_alone(config: type, caplog: pytest.LogCaptureFixture) -> None:
    trainer = recurrent(config)
    queries = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([10]), torch.tensor([11, 12])]
    together = trainer.generate(queries, batch_size=3, **PLAIN)
    alone = [trainer.generate([query], **PLAIN)[0] for query in queries]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
    said = [record for record in caplog.records if "reads the padding" in record.getMessage()]
    assert len(said) == (config is RwkvConfig)


def test_a_model_that_reads_padding_has_none_of_fixed_width() -> None:
    trainer = recurrent(RwkvConfig, pad_for_acceleration=True, pad_max_input_len=6, pad_max_len=12)
    with pytest.raises(ValueError, match=r"pad_for_acceleration is True.*reads the padding"):
        trainer.generate([torch.tensor([5, 6])], **PLAIN)


def test_older_arguments_about_padding(caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer()
    queries = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    expected = trainer.generate(queries, **PLAIN)
    for _ in range(2):
        found = trainer.generate(queries, remove_padding=True, pad_to_multiple_of=8, **PLAIN)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    assert len([r for r in caplog.records if "pad_to_multiple_of" in r.getMessage()]) == 1
    with pytest.raises(ValueError, match=r"remove_padding is False, expected True.*pad_sequence"):
        trainer.generate(queries, remove_padding=False, **PLAIN)
    trainer.response_generator.check(remove_padding=True, pad_to_multiple_of=8)


def test_an_optimiser_that_finds_its_own_rate_trains(tmp_path: Path) -> None:
    trainer = make_trainer(
        optimizer_of=lambda model: Adafactor(model.parameters(), relative_step=True, warmup_init=True, lr=None),
        project_kwargs={"logging_dir": str(tmp_path)},
    )
    before = trainer.model.v_head.summary.weight.clone()
    stats = trainer.step(*make_batch())
    assert math.isnan(stats["ppo/learning_rate"])
    assert not torch.equal(trainer.model.v_head.summary.weight, before)
    trainer.log_stats(stats, {}, [1.0] * 6)
    trainer.close()
    [metrics] = tmp_path.rglob("metrics.jsonl")
    assert json.loads(metrics.read_text().splitlines()[-1]).get("ppo/learning_rate") is None


def test_an_adapter_as_a_dictionary_is_named() -> None:
    with pytest.raises(TypeError, match=r"peft_config is a dict.*peft\.LoraConfig\(\*\*"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model(), peft_config={"r": 2})


def test_a_compiled_model_is_named() -> None:
    with pytest.raises(TypeError, match=r"torch\.compile"):
        AutoModelForCausalLMWithValueHead.from_pretrained(torch.compile(tiny_model(), backend="eager"))
