"""The model card is always written, says how to load the model with this project, and keeps what others wrote."""

import re
from pathlib import Path
from typing import Any

import pytest

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.reporting.model_card import MARK, is_ours, write_model_card
from tests.runtime.support.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import make_batch, make_trainer


def test_saving_writes_a_card_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL asks the hub for a template, and goes on in silence when it cannot."""
    import socket

    def refuse(*_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    trainer = make_trainer(gamma=0.9)
    trainer.step(*make_batch())
    trainer.save_pretrained(tmp_path / "cheerful")
    card = (tmp_path / "cheerful" / "README.md").read_text()
    assert "# cheerful" in card
    assert "After 1 step of\n6 sequences" in card
    assert "| gamma | 0.9 |" in card


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_card_recommends_nothing_but_this_project(family: str, tmp_path: Path) -> None:
    make_trainer(family).create_model_card(str(tmp_path), "some/policy")
    card = (tmp_path / "README.md").read_text()
    assert not re.search(r"\btrl\b|accelerate|pip install", card, re.IGNORECASE)
    kind = "Seq2Seq" if family == "t5" else "Causal"
    assert f'AutoModelFor{kind}LMWithValueHead.from_pretrained("some/policy")' in card
    assert "from ppo_runtime import" in card


def test_the_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer()
    trainer.save_pretrained(tmp_path)
    trainer.create_model_card(str(tmp_path), str(tmp_path))
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    exec(compile(code.replace("Once upon a time", "once"), "card", "exec"), {})
    assert capsys.readouterr().out


def test_a_card_of_ones_own_is_kept(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.save_pretrained(tmp_path)
    assert is_ours(tmp_path)
    (tmp_path / "README.md").write_text("My model.")
    trainer.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My model."
    trainer.create_model_card(str(tmp_path))
    assert MARK in (tmp_path / "README.md").read_text()


def test_a_card_of_an_adapter_is_ours_at_every_save(tmp_path: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=tiny_lora("llama"))
    trainer = PPOTrainer(PPOConfig(batch_size=2, accel="eager"), model, None, tiny_tokenizer())
    for _ in range(2):
        trainer.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text().count(MARK) == 1


@pytest.mark.parametrize(
    ("base", "named"), [("org/model", True), ("gpt2", True), ("/somewhere/on/disk", False), ("", False), (None, False)]
)
def test_only_a_public_base_model_is_named(base: str | None, named: bool, tmp_path: Path) -> None:
    path = write_model_card(tmp_path, "policy", config=PPOConfig(), base_model=base, is_encoder_decoder=False, steps=3)
    assert (f"base_model: {base}" in path.read_text()) == named
    assert not base or named == (base in path.read_text())


def test_what_was_switched_off_is_told(tmp_path: Path) -> None:
    config = PPOConfig(adap_kl_ctrl=False, remove_unused_columns=False)
    path = write_model_card(tmp_path, "x", config=config, base_model=None, is_encoder_decoder=False, steps=1)
    assert "| adap_kl_ctrl | False |" in path.read_text()


def test_nothing_private_is_published(tmp_path: Path) -> None:
    config = PPOConfig(
        push_to_hub_if_best_kwargs={"repo_id": "a/b", "token": "secret"},
        tracker_kwargs={"entity": "secret"},
        project_kwargs={"logging_dir": "/secret"},
    )
    path = write_model_card(tmp_path, "x", config=config, base_model=None, is_encoder_decoder=False, steps=1)
    assert "secret" not in path.read_text()


def test_a_card_tells_no_password(tmp_path: Path) -> None:
    """Of an address that somebody has put where a name was expected."""
    write_model_card(
        tmp_path,
        "m",
        config=PPOConfig(task_name="https://me:horse-battery-staple@example.org/x"),
        base_model=None,
        is_encoder_decoder=False,
        steps=1,
    )
    card = (tmp_path / "README.md").read_text()
    assert "| task_name | https://me:(hidden)@example.org/x |" in card
    assert "staple" not in card
