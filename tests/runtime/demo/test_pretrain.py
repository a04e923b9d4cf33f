"""How the embedded model is made: chapters, batches, schedule, a cut run, prompts, and all of it together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_runtime.demo.pretrain import __main__ as command
from ppo_runtime.demo.pretrain import training
from ppo_runtime.demo.pretrain.model import build_model, regularise, train_tokenizer
from ppo_runtime.demo.pretrain.novels import Chapter, chapters_of, read_chapters
from ppo_runtime.demo.pretrain.prompts import make_prompts, openings

NOVEL = """EMMA
by somebody
VOLUME I
CHAPTER I

It was a _fine_ morning,
and everybody* walked.

* * *

VOLUME II

Chapter 2.

Nobody came.
FINIS
A Note on the Text

Chapter 3

Set in Bembo."""

SENTENCE = "The {} people of the village walked to the house of the miller and came to the bridge and the water again"


def chapters(count: int = 24) -> list[Chapter]:
    """One novel of made-up sentences; each chapter of its own."""
    rng = random.Random(0)
    syllables = ["ba", "de", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu"]

    def word() -> str:
        return "".join(rng.choices(syllables, k=3))

    def paragraph() -> str:
        return ". ".join(f"{SENTENCE.format(word())} with {word()} and {word()}" for _ in range(4)) + "."

    return [Chapter("novel", number, [paragraph() for _ in range(12)]) for number in range(1, count + 1)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 2 x 16 tokens."""
    monkeypatch.setattr(training, "CONTEXT", 16)
    monkeypatch.setattr(training, "BATCH", 2)


def test_a_novel_is_cut_at_its_headings() -> None:
    """Title page, volumes, marks of emphasis, rows of stars and what follows the end are dropped."""
    found = list(chapters_of("emma", NOVEL.splitlines()))
    assert [(c.novel, c.number, c.paragraphs) for c in found] == [
        ("emma", 1, ["It was a fine morning, and everybody walked."]),
        ("emma", 2, ["Nobody came."]),
    ]


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no janeaustenr.*: unpack the package there"):
        read_chapters(tmp_path)


def test_chapters_8_24_40_and_56_are_held_out() -> None:
    assert [number for number in range(1, 62) if Chapter("", number, []).held_out] == [8, 24, 40, 56]


def test_an_epoch_reads_no_token_twice(small: None) -> None:
    """All batches of an epoch lie beside one another; the next epoch cuts elsewhere."""
    stream = torch.arange(1000)
    per_epoch = (1000 // 16 - 1) // 2
    epochs = [torch.stack([training.batch_at(stream, e * per_epoch + i, 0) for i in range(per_epoch)]) for e in (0, 1)]
    for epoch in epochs:
        assert epoch.unique().numel() == epoch.numel() == per_epoch * 2 * 16
    assert not torch.equal(*epochs)
    assert torch.equal(training.batch_at(stream, 5, 0), epochs[0][5])


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    rates = [training.rate_at(step, 900) for step in range(900)]
    rising, held, falling = rates[:100], rates[100:601], rates[600:]
    assert rising == sorted(rising)
    assert set(held) == {training.PEAK_RATE}
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 1e-4 * training.PEAK_RATE


def make(tmp_path: Path, **changed: Any) -> tuple[Any, training.Best]:
    tokenizer = train_tokenizer(chapters(2)[0].paragraphs)
    stream = training.encode(tokenizer, chapters(2)[0].paragraphs)
    torch.manual_seed(0)
    model = build_model(tokenizer)
    regularise(model, 0.1)
    settings: dict[str, Any] = {"steps": 4, "seed": 0, "resume": False, "evaluate_every": 2, "save_seconds": 0.0}
    checkpoint = tmp_path / "checkpoint.pt"
    return model, training.train(
        model, stream, stream[:64], checkpoint=checkpoint, compiled=False, **settings | changed
    )


def test_a_cut_run_ends_where_an_unbroken_one_does(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: the dropout masks and batches are those of the step, wherever the run began."""
    model, best = make(tmp_path)

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> float:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "held_out_loss", killed)
        with pytest.raises(Killed):
            make(tmp_path)
    again, resumed = make(tmp_path, resume=True)
    assert (best.loss, best.step) == (resumed.loss, resumed.step)
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(SystemExit, match="is of a run with --steps 4 --seed 0"):
        make(tmp_path, resume=True, seed=1)


def test_prompts_are_neutral_openings_of_what_is_held_out() -> None:
    """6 to 12 words, more of the sentence behind them, and never from a chapter that was trained on."""
    rows = make_prompts(chapters(), seed=0)
    assert rows == make_prompts(chapters(), seed=0)
    prompts = [row["prompt"] for row in rows]
    assert len(prompts) == len(set(prompts)) > 10
    text = {
        split: " ".join(text for c in chapters() if c.number in numbers for text in c.paragraphs)
        for split, numbers in {"train": (8,), "eval": (24,)}.items()
    }
    for row in rows:
        assert 6 <= len(row["prompt"].split()) <= 12
        assert f"{row['prompt']} " in text[row["split"]]
    cheerful = Chapter("", 8, ["It was a wonderful and happy day for all, " + SENTENCE.format("old") + "."])
    assert list(openings(cheerful, random.Random(0))) == []


def test_the_command_makes_what_the_demo_ships(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "read_chapters", lambda texts: chapters())
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    command.pretrain(texts=tmp_path, output=tmp_path / "made", steps=2)
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert made >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "prompts.jsonl"}
    assert "checkpoint.pt" not in made
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert model.config.vocab_size >= len(tokenizer)
    card = (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    assert "2 of\n24 chapters" in card
    assert "{" not in card
