"""Checkpoints: training that was interrupted ends in the same bits as training that was not."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.checkpoint import load_checkpoint, newest_good, save_checkpoint
from ppo_runtime.common.files import siblings
from ppo_runtime.common.trees import plain
from ppo_runtime.resuming import files, frozen
from ppo_runtime.resuming.frozen import frozen_digest
from tests.runtime.support.sealing import change, make_old
from tests.runtime.support.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import untimed


def make_trainer(*, lora: bool = False, seed: int = 0, **settings: Any) -> PPOTrainer:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_model("llama", seed=seed, dropout=0.1), peft_config=tiny_lora("llama") if lora else None
    )
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad and p.ndim == 2):
            if not parameter.any():  # LoRA begins at 0, and every start should be the same
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter) * (index + 1))
        model.v_head.summary.weight.fill_(0.1)
        model.v_head.summary.bias.fill_(0.2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    config = PPOConfig(
        **({"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "horizon": 20, "accel": "eager"} | settings)
    )
    rows = Dataset.from_dict({"input_ids": [[10 + row] * (1 + row % 4) for row in range(10)]})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return PPOTrainer(config, model, None, tiny_tokenizer(), rows, optimizer=optimizer, lr_scheduler=scheduler)


def run(trainer: PPOTrainer, steps: int) -> list[dict[str, Any]]:
    """Steps on the trainer's own data, with scores that draw from all three generators."""
    history: list[dict[str, Any]] = []
    assert trainer.dataloader is not None
    while len(history) < steps:
        for batch in trainer.dataloader:
            queries = [torch.tensor(ids) for ids in batch["input_ids"]]
            responses = trainer.generate(
                queries, batch_size=4, return_prompt=False, max_new_tokens=5, do_sample=True, top_k=0
            )
            noise = random.random() + np.random.random()  # noqa: NPY002  as a user's score function may
            scores = [response.float().mean() / 50 + noise for response in responses]
            stats = trainer.step(queries, responses, scores)
            history.append(untimed(stats))
            if len(history) == steps:
                break
    return history


def assert_same_history(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_same_weights(one: PPOTrainer, other: PPOTrainer) -> None:
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("lora", "done"), [(False, 1), (False, 2), (True, 3)])
def test_four_steps_are_some_steps_a_checkpoint_and_the_others(lora: bool, done: int, tmp_path: Path) -> None:
    """Two batches make an epoch here, so that checkpoints lie inside an epoch and between two."""
    straight = make_trainer(lora=lora)
    expected = run(straight, 4)
    first = make_trainer(lora=lora)
    history = run(first, done)
    save_checkpoint(first, tmp_path / "checkpoint")
    second = make_trainer(lora=lora)
    run(second, 1)  # whatever happened to it before is gone
    load_checkpoint(second, tmp_path / "checkpoint")
    assert second.current_step == done
    assert second.kl_ctl.value == first.kl_ctl.value
    assert_same_history(history + run(second, 4 - done), expected)
    assert_same_weights(second, straight)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    expected = run(make_trainer(), 2)
    saving = make_trainer()
    history = run(saving, 1)
    save_checkpoint(saving, tmp_path / "one")
    save_checkpoint(saving, tmp_path / "two")
    # run() has left its epoch, and the next one would be another; go on where the trainer says it stands.
    batches: Any = saving.dataloader and saving.dataloader.batch_sampler
    batches.load_state_dict(batches.state_dict())
    assert_same_history(history + run(saving, 1), expected)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_no_pickle_and_only_what_trains(tmp_path: Path) -> None:
    trainer = make_trainer(lora=True)
    run(trainer, 1)
    path = save_checkpoint(trainer, tmp_path / "deep" / "checkpoint")
    assert {file.name for file in path.iterdir()} == {
        "policy.safetensors",
        "optimizer.safetensors",
        "state.json",
        "rank-0.json",
        "manifest.json",
    }
    names = set(load_file(path / "policy.safetensors"))
    assert all("lora_" in name or name.startswith("v_head.") for name in names)
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint"]


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    run(trainer, 1)
    path = save_checkpoint(trainer, tmp_path / "checkpoint")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    run(trainer, 1)
    for broken in ("write_tensors", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(files, broken, lambda *args: (_ for _ in ()).throw(OSError("no space left")))
            with pytest.raises(OSError, match="no space left"):
                save_checkpoint(trainer, path)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    # Stopped between the two renames: what was replaced is still found.
    path.rename(siblings(path)[1])
    load_checkpoint(trainer, path)
    assert trainer.current_step == 1


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer()
    run(trainer, 1)
    path = save_checkpoint(trainer, tmp_path / "checkpoint")

    def assert_refused(other: PPOTrainer, message: str) -> None:
        before = {name: value.clone() for name, value in other.model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_checkpoint(other, path)
        assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
        assert other.current_step == 0

    assert_refused(make_trainer(lora=True), "made with another model")
    assert_refused(make_trainer(seed=1), "the reference, or the layers that do not train, differ")
    without = make_trainer()
    without.lr_scheduler = None
    assert_refused(without, "has an lr_scheduler state, and the trainer has none")
    state = json.loads((path / "state.json").read_text())
    for field, value, message in (("format", 99, "has format 99"), ("world_size", 2, "is of 2 ranks, and there are")):
        change(path, "state.json", lambda _, field=field, value=value: state | {field: value})
        assert_refused(make_trainer(), message)
    change(path, "state.json", lambda _: state)
    with pytest.raises(FileNotFoundError, match=r"holds no state\.json"):
        load_checkpoint(trainer, tmp_path / "nowhere")

    load_checkpoint(make_trainer(), path)
    assert not caplog.messages
    load_checkpoint(make_trainer(gamma=0.5, exp_name="another"), path)
    assert "gamma was 1.0 and is 0.5" in caplog.text
    assert "exp_name" not in caplog.text


def test_an_object_that_would_need_pickle_is_named() -> None:
    with pytest.raises(TypeError, match=r"lr_scheduler\.milestones is a object"):
        plain({"milestones": object()}, "lr_scheduler")


def test_a_reference_differs_by_its_weights_and_not_by_its_unused_head(tmp_path: Path) -> None:
    """The next process draws another value head before the reference is copied."""
    first = make_trainer()
    saved = save_checkpoint(first, tmp_path / "saved")
    other = make_trainer()
    with torch.no_grad():
        other.ref_model.v_head.summary.weight.fill_(0.7)
    load_checkpoint(other, saved)
    changed = make_trainer()
    with torch.no_grad():
        next(changed.ref_model.pretrained_model.parameters()).add_(1)
    with pytest.raises(ValueError, match="other frozen weights"):
        load_checkpoint(changed, saved)


def test_a_digest_of_before_is_still_known(tmp_path: Path) -> None:
    first = make_trainer()
    saved = save_checkpoint(first, tmp_path / "saved")
    change(saved, "state.json", lambda state: state | {"frozen": frozen_digest(first, reference_head=True)})
    make_old(saved)
    load_checkpoint(make_trainer(), saved)


def test_frozen_weights_are_read_once_and_again_when_they_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they change: by torch, behind its back, or by another tensor in their place."""
    read: list[str] = []
    add = frozen._add
    monkeypatch.setattr(frozen, "_add", lambda digest, name, tensor: (read.append(name), add(digest, name, tensor)))
    trainer = make_trainer()
    weight = next(iter(trainer.ref_model.pretrained_model.parameters()))
    digests = [frozen_digest(trainer)]
    once = len(read)
    assert once > 10
    for done in range(3):
        save_checkpoint(trainer, tmp_path / str(done))
    assert len(read) == once
    for change_it in (
        lambda: weight.detach().flatten()[1].add_(1),  # none of those that are looked at
        lambda: weight.detach().add_(1),
        lambda: weight.data.add_(1),
        lambda: setattr(weight, "data", weight.data + 1),
    ):
        change_it()
        digests.append(frozen_digest(trainer))
    assert len(set(digests)) == len(digests)
    assert len(read) == 5 * once
    load_checkpoint(make_trainer(), tmp_path / "0")


def test_nothing_to_go_on_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="directory is None, expected that of a checkpoint: newest_good"):
        load_checkpoint(make_trainer(), newest_good(tmp_path))


def test_no_checkpoint_is_made_that_could_not_be_loaded(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.kl_ctl = SimpleNamespace(value=math.nan, update=lambda *_: None)
    with pytest.raises(ValueError, match=r"kl_ctl\.value is nan, expected a finite number"):
        save_checkpoint(trainer, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
