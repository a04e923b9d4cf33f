"""The classic loop end to end on tiny models: dataset, length sampler, reward pipeline, LoRA in bf16, logs, saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from ppo_runtime import AutoModelForCausalLMWithValueHead
from ppo_runtime.demo import classic
from ppo_runtime.demo.classic import ClassicOptions
from ppo_runtime.recipe import read_prompts
from tests.runtime.support.tiny import EOS, VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    """A policy, a reward model and prompts on disk."""
    for name, model in {
        "model": tiny_model("llama"),
        "reward": BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                id2label={0: "NEGATIVE", 1: "POSITIVE"},
                label2id={"NEGATIVE": 0, "POSITIVE": 1},
                pad_token_id=0,
            )
        ),
    }.items():
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    prompts = [f"{word}, " for word in ("It was", "She", "Nobody", "They say", "Once", "In May", "A man")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    return {name: tmp_path / name for name in ("model", "reward", "prompts.txt", "output")}


def options(directories: dict[str, Path], **more: Any) -> ClassicOptions:
    fields: dict[str, Any] = {
        "model": directories["model"],
        "output": directories["output"],
        "reward_model": directories["reward"],
        "prompts": directories["prompts.txt"],
        "steps": 4,
        "batch_size": 3,
        "mini_batch_size": 1,
        "response_length": (2, 5),
        "save_every": 2,
        "dtype": "bfloat16",
    }
    return ClassicOptions(**(fields | more))


def test_the_classic_pipeline(directories: dict[str, Path]) -> None:
    """Four steps of three sequences; metrics of each, the adapter and its head saved after every second."""
    history = classic.run(options(directories))
    assert len(history) == 4
    for stats in history:
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in stats.values())
        assert set(stats["tokens/responses_dist"]) <= {1.0, 2.0, 3.0, 4.0, 5.0}
        assert stats["ppo/policy/first_minibatch_ratio_deviation"] < 0.1  # bfloat16
    assert history[0]["ppo/std_scores"] > 0.0
    lines = [json.loads(line) for line in (directories["output"] / "metrics.jsonl").read_text().splitlines()]
    assert "env/reward_mean" in json.dumps(lines)
    for step in (2, 4):
        saved = directories["output"] / f"step-{step}"
        assert {"adapter_model.safetensors", "value_head.safetensors", "tokenizer.json"} <= {
            file.name for file in saved.iterdir()
        }
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained(saved)
        assert loaded.is_peft_model
    assert not (directories["output"] / "step-3").exists()


def test_the_whole_model_from_the_command_line(directories: dict[str, Path], capsys: Any) -> None:
    arguments = {
        "--model": directories["model"],
        "--output": directories["output"],
        "--reward-model": directories["reward"],
        "--prompts": directories["prompts.txt"],
        "--label": "NEGATIVE",
        "--steps": 1,
        "--batch-size": 2,
        "--mini-batch-size": 1,
        "--rank": 0,
    }
    classic.main([str(part) for pair in arguments.items() for part in pair] + ["--response-length", "2", "3"])
    assert "step 1/1  score" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(directories["output"] / "step-1")


def test_the_score_is_the_labels_logit(directories: dict[str, Path]) -> None:
    scores = {label: classic._scores(options(directories, label=label)) for label in ("NEGATIVE", "POSITIVE", None)}
    texts = (["ab", "c"], ["x", "yz"])
    reward = BertForSequenceClassification.from_pretrained(directories["reward"]).eval()
    tokens = tiny_tokenizer()(["abx", "cyz"], return_tensors="pt")
    with torch.no_grad():
        logits = reward(**tokens).logits
    for label, column in {"NEGATIVE": 0, "POSITIVE": 1, None: 1}.items():
        assert scores[label](*texts) == pytest.approx(logits[:, column].tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="label is 'JOY', expected one of the reward model's: NEGATIVE, POSITIVE"):
        classic._scores(options(directories, label="JOY"))


@pytest.mark.parametrize("case", ["EOS alone", "neither", "padding on the left"])
def test_a_text_scores_the_same_alone_and_beside_longer_ones(directories: dict[str, Path], case: str) -> None:
    """GPT-2's tokenizer has no padding token, and its positions count what is in front."""
    reward = GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=64,
            num_labels=2,
            bos_token_id=1,
            eos_token_id=1,
        )
    ).eval()
    reward.save_pretrained(directories["reward"])
    tokenizer = tiny_tokenizer()
    if case == "padding on the left":
        tokenizer.padding_side = "left"
    else:
        tokenizer.pad_token = None
    if case == "neither":
        tokenizer.eos_token = None
    tokenizer.save_pretrained(directories["reward"])
    score = classic._scores(options(directories, label="LABEL_1"))
    together = score(["ab", "c", ""], ["x", "yzwvu", "q"])
    alone = [score([query], [response])[0] for query, response in (("ab", "x"), ("c", "yzwvu"), ("", "q"))]
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("between", ["\n", "\r\n", "\n\n", "\n \t\n"], ids=repr)
def test_a_line_is_a_prompt_and_a_blank_one_is_none(between: str, tmp_path: Path) -> None:
    """Whatever else of Unicode may look like the end of a line."""
    prompts = ["a\x0bb", "c\u2028d", "e\x85f \x1cg", "  h "]
    (tmp_path / "prompts.txt").write_bytes(("\ufeff" + between.join(prompts) + between).encode())
    assert read_prompts(tmp_path / "prompts.txt") == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no prompt"), (b"\n \n", "holds no prompt"), (b"\xff\xfe", "is no text in UTF-8")],
)
def test_a_file_without_prompts_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"prompts\.txt {message}"):
        read_prompts(tmp_path / "prompts.txt")


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        (["ab"] * 6 + ["c" * 62], {}, r"dataset\[6\]\['input_ids'\] has 62 tokens, expected at most 59"),
        (["ab"] * 6, {"response_length": (2, 100)}, r"\['max_new_tokens'\] is 100, expected at most 63"),
    ],
)
def test_what_has_no_room_is_found_before_the_first_step(
    prompts: list[str], more: dict[str, Any], message: str, directories: dict[str, Path]
) -> None:
    directories["prompts.txt"].write_text("\n".join(prompts))
    with pytest.raises(ValueError, match=message):
        classic.run(options(directories, **more))
    assert not directories["output"].exists()


def test_an_error_closes_the_trackers(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    def fail(*_: Any) -> Any:
        raise RuntimeError("mine")

    monkeypatch.setattr(classic, "_scores", lambda _: fail)
    monkeypatch.setattr(classic.PPOTrainer, "close", lambda _, failed=False: closed.append(failed))
    with pytest.raises(RuntimeError, match="mine"):
        classic.run(options(directories))
    assert closed == [True]


def test_a_reward_model_without_a_limit_reads_all(directories: dict[str, Path]) -> None:
    config = T5Config(**{**tiny_config("t5").to_dict(), "num_labels": 2, "id2label": {0: "NEGATIVE", 1: "POSITIVE"}})
    T5ForSequenceClassification(config).save_pretrained(directories["reward"])
    score = classic._scores(options(directories))
    assert score(["a " * 300], ["answer" + EOS]) != score(["b " * 300], ["answer" + EOS])


@pytest.mark.parametrize("known_to", ["the tokenizer", "the model"])
def test_a_text_too_long_for_the_reward_model_keeps_its_end(known_to: str, directories: dict[str, Path]) -> None:
    """The response, which is what is scored."""
    if known_to == "the tokenizer":
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 6
        tokenizer.save_pretrained(directories["reward"])
    else:
        config = BertConfig.from_pretrained(directories["reward"], max_position_embeddings=6)
        BertForSequenceClassification(config).save_pretrained(directories["reward"])
    score = classic._scores(options(directories))
    assert score(["a long prompt: "], ["answer"]) == pytest.approx(score([""], ["answer"]))


def test_help_and_defaults_from_the_command_line(capsys: Any) -> None:
    classic.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("python -m ppo_runtime.demo.classic", "--reward-model", "default: 20", "default: 0.0001"):
        assert text in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--save-every", "0"], "greater than or equal to 1|x>=1"),
        (["--dtype", "floaty"], "--dtype is floaty, expected one of"),
        (["--dtype", "int64"], "--dtype is int64, expected one of"),
        (["--response-length", "9", "4"], "--response-length is 9 4, expected LEAST"),
        (["--response-length", "0", "4"], "--response-length is 0 4, expected LEAST"),
    ],
)
def test_bad_options_are_named_before_anything_is_loaded(options: list[str], message: str, tmp_path: Path) -> None:
    """The error itself, which the command line prints with the usage and exit code 2."""
    with pytest.raises(Exception, match=message):
        classic.main(["--model", str(tmp_path), "--output", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()
