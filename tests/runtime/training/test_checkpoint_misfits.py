"""Checkpoints that do not fit, are damaged, or would be made where something else is: refused, and nothing changes."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppo_runtime import PPOTrainer
from ppo_runtime.checkpoint import load_checkpoint, newest_good, save_checkpoint, steps_done
from ppo_runtime.common.trees import plain, restored
from ppo_runtime.loop import train
from ppo_runtime.ranks import agreement
from ppo_runtime.ranks.generators import generator_states, restore_generators
from ppo_runtime.ranks.world import World
from ppo_runtime.reporting.jsonl import read_jsonl
from ppo_runtime.resuming import files, sealing
from tests.runtime.support.sealing import change, make_old
from tests.runtime.support.trainers import make_batch, make_trainer

WRITTEN = "manifest.json", "optimizer.safetensors", "policy.safetensors", "rank-0.json", "state.json"
SCHEDULERS = torch.optim.lr_scheduler


def adam(model: Any, order: Callable[[list[Any]], list[Any]] = list) -> torch.optim.Optimizer:
    return torch.optim.Adam(order(list(model.parameters())), lr=1e-3)


def exchanged(parameters: list[Any]) -> list[Any]:
    """Two of one shape have changed places."""
    first, second = [index for index, parameter in enumerate(parameters) if parameter.shape == (16, 16)][:2]
    parameters[first], parameters[second] = parameters[second], parameters[first]
    return parameters


def in_two_groups(model: Any) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.Adam([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=1e-3)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": adam,
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-3),
    "two groups": in_two_groups,
    "backwards": lambda model: adam(model, lambda parameters: parameters[::-1]),
    "exchanged": lambda model: adam(model, exchanged),
}
MADE: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "linear": SCHEDULERS.LinearLR,
    "cosine": lambda optimizer: SCHEDULERS.CosineAnnealingLR(optimizer, T_max=10),
    "sequential": lambda optimizer: SCHEDULERS.SequentialLR(
        optimizer, [SCHEDULERS.ConstantLR(optimizer), SCHEDULERS.ExponentialLR(optimizer, 0.9)], [2]
    ),
    "another sequence": lambda optimizer: SCHEDULERS.SequentialLR(
        optimizer, [SCHEDULERS.ConstantLR(optimizer), SCHEDULERS.CosineAnnealingLR(optimizer, T_max=10)], [2]
    ),
}


def trainer_with(optimizer: str = "adam", scheduler: str | None = None, **settings: Any) -> PPOTrainer:
    trainer = make_trainer(optimizer_of=OPTIMIZERS[optimizer], **settings)
    trainer.lr_scheduler = None if scheduler is None else MADE[scheduler](trainer.optimizer)
    return trainer


def saved(trainer: PPOTrainer, path: Path, *, old: bool = False) -> Path:
    """A checkpoint after one step; an old one knows less of what it was made with."""
    trainer.step(*make_batch())
    save_checkpoint(trainer, path)
    if old:
        make_old(path)
        state = json.loads((path / "state.json").read_text())
        del state["optimizer_made_of"], state["scheduler_class"]
        (path / "state.json").write_text(json.dumps(state))
    return path


def everything(trainer: PPOTrainer) -> dict[str, Any]:
    """All that loading changes."""
    return copy.deepcopy(
        {
            "weights": dict(trainer.model.state_dict()),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": None if trainer.lr_scheduler is None else trainer.lr_scheduler.state_dict(),
            "trainer": trainer.state_dict(),
            "shuffle": trainer.shuffle.get_state(),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": str(np.random.get_state()),  # noqa: NPY002  set_seed seeds this generator
            "others": [trainer.run_log.goes_on_after, trainer.broken_off],
        }
    )


def assert_refused(trainer: PPOTrainer, path: Path, message: str) -> None:
    before = everything(trainer)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(trainer, path)
    assert str(everything(trainer)) == str(before)
    torch.testing.assert_close(everything(trainer)["weights"], before["weights"], rtol=0, atol=0)


# --- another optimiser or scheduler ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ("adam", "sgd", "the state of Adam, and the optimizer is SGD"),
        ("sgd", "adam", "the state of SGD, and the optimizer is Adam"),
        ("adam", "adamw", "the state of Adam, and the optimizer is AdamW"),
        ("adam", "two groups", r"groups of \[\d+\] parameters, and here are \[3, \d+\]"),
        ("two groups", "adam", r"groups of \[3, \d+\] parameters"),
        ("adam", "backwards", "in the same order"),
        ("adam", "exchanged", r"state for .* where the optimizer has .* now"),
    ],
)
def test_another_optimiser_is_refused(then: str, now: str, message: str, tmp_path: Path) -> None:
    path = saved(trainer_with(then), tmp_path / "checkpoint")
    assert_refused(trainer_with(now), path, message)


def test_moments_of_another_shape_are_refused_in_an_old_checkpoint_too(tmp_path: Path) -> None:
    path = saved(trainer_with("adam"), tmp_path / "checkpoint", old=True)
    assert_refused(trainer_with("backwards"), path, r"exp_avg of shape .* for a parameter of shape")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "momentum", "adamw", "adafactor", "two groups", "backwards"])
@pytest.mark.parametrize("scheduler", [None, "sequential"])
def test_the_same_optimiser_goes_on(optimizer: str, scheduler: str | None, old: bool, tmp_path: Path) -> None:
    first = trainer_with(optimizer, scheduler)
    path = saved(first, tmp_path / "checkpoint", old=old)
    second = trainer_with(optimizer, scheduler)
    load_checkpoint(second, path)
    for one in (first, second):
        one.step(*make_batch(seed=1))
    torch.testing.assert_close(
        dict(second.model.named_parameters()), dict(first.model.named_parameters()), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ("linear", "cosine", "state of LinearLR, and the lr_scheduler is CosineAnnealingLR"),
        ("linear", "sequential", r"state of LinearLR, and the lr_scheduler is SequentialLR\(ConstantLR, ExponentialLR"),
        ("sequential", "another sequence", r"ExponentialLR\), and the lr_scheduler is SequentialLR"),
        ("linear", None, "has an lr_scheduler state, and the trainer has none"),
        (None, "linear", "has no lr_scheduler state, and the trainer has one"),
    ],
)
def test_another_scheduler_is_refused(then: str | None, now: str | None, message: str, tmp_path: Path) -> None:
    path = saved(trainer_with(scheduler=then), tmp_path / "checkpoint")
    assert_refused(trainer_with(scheduler=now), path, message)


def test_an_old_checkpoint_with_another_scheduler_changes_nothing(tmp_path: Path) -> None:
    path = saved(trainer_with(scheduler="linear"), tmp_path / "checkpoint", old=True)
    assert_refused(trainer_with(scheduler="sequential"), path, r"does not fit this lr_scheduler \(lr_scheduler has ")


# --- what is announced is true --------------------------------------------------------------------------------------


def test_another_learning_rate_holds_from_there_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make_trainer()
    path = saved(first, tmp_path / "checkpoint")
    first.optimizer.param_groups[0]["lr"] = 5e-5
    second = make_trainer(learning_rate=5e-5)
    load_checkpoint(second, path)
    assert "learning_rate was 0.001 and is 5e-05 (the optimizer goes on at 5e-05)" in caplog.text
    assert "kept" not in caplog.text
    for one in (first, second):
        assert one.step(*make_batch(seed=1))["ppo/learning_rate"] == 5e-5
    torch.testing.assert_close(second.model.state_dict(), first.model.state_dict(), rtol=0, atol=0)


def test_a_learning_rate_set_during_the_run_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make_trainer()
    first.optimizer.param_groups[0]["lr"] = 7e-4
    second = make_trainer()
    load_checkpoint(second, saved(first, tmp_path / "checkpoint"))
    assert second.optimizer.param_groups[0]["lr"] == 7e-4
    assert "lr of the optimizer was 0.0007 and is 0.001 (the checkpoint's is kept)" in caplog.text


def test_what_is_in_force_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(trainer_with(scheduler="linear"), tmp_path / "checkpoint")
    other = trainer_with(scheduler="linear", learning_rate=5e-5, init_kl_coef=0.7, seed=3)
    load_checkpoint(other, path)
    assert other.kl_ctl.value == 0.7
    assert "init_kl_coef was 0.2 and is 0.7 (the controller goes on from 0.7)" in caplog.text
    assert "seed was 0 and is 3 (the random generators and the order of the data are kept from the" in caplog.text
    assert "is 5e-05 (the scheduler and its learning rates are kept from the checkpoint)" in caplog.text


# --- fewer devices, other buffers -----------------------------------------------------------------------------------


def with_cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> dict[int, list[int]]:
    """As many CUDA devices as that, as far as random states go: what each was given, by its number."""
    given: dict[int, list[int]] = {}

    def take(state: torch.Tensor, device: Any = "cuda") -> None:
        place = device if isinstance(device, int) else torch.device(device).index or 0
        if place >= count:
            raise RuntimeError("invalid device ordinal")
        given[place] = state.tolist()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for module_with_it in (torch.cuda, torch.cuda.random):
        monkeypatch.setattr(module_with_it, "set_rng_state", take)
    return given


def with_states(path: Path, states: list[int] | None, device: int | None) -> Path:
    """A checkpoint as one of a trainer on that CUDA device, of several."""

    def edit(held: Any) -> Any:
        found = None if states is None else [{"tensor": [state], "dtype": "uint8", "shape": [1]} for state in states]
        return {"dict": list((dict(held["dict"]) | {"cuda": found, "cuda_device": device}).items())}

    change(path, "rank-0.json", edit)
    return path


@pytest.mark.parametrize(
    ("stored", "here", "given"),
    [
        ([7], 1, {0: [7]}),
        ([7, 8], 2, {0: [7], 1: [8]}),
        ([7, 8], 3, {0: [7], 1: [8]}),
        ([7, 8, 9], 1, {0: [7]}),
        ([7, 8, 9], 2, {0: [7], 1: [8]}),
        ([7, 8], 0, {}),
        (None, 1, {}),
    ],
)
def test_what_has_no_device_here_is_said_and_the_rest_restored(
    stored: list[int] | None,
    here: int,
    given: dict[int, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = with_states(saved(make_trainer(), tmp_path / "checkpoint"), stored, None)
    trainer = make_trainer()
    found = with_cuda(monkeypatch, here)
    load_checkpoint(trainer, path)
    assert trainer.current_step == 1
    assert found == given
    said = f"random states of {len(stored or [])} CUDA devices, and there are {here} here"
    assert [said in message for message in caplog.messages] == ([True] if len(stored or []) > here else [])


@pytest.mark.parametrize(("then", "now", "given"), [(1, 0, [8]), (0, 1, [7]), (2, 0, [9]), (None, 1, [8]), (7, 0, [7])])
def test_the_policys_device_goes_on_with_the_state_of_the_policys_device(
    then: int | None, now: int, given: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes on two devices, each gone on with where it sees its own alone."""
    states = generator_states(torch.Generator(), torch.device("cpu"))
    found = with_cuda(monkeypatch, 2)
    states |= {"cuda": [torch.tensor([number], dtype=torch.uint8) for number in (7, 8, 9)], "cuda_device": then}
    restore_generators(states, torch.Generator(), torch.device("cuda", now))
    assert found[now] == given


def test_the_device_of_the_policy_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.zeros(1, dtype=torch.uint8)] * 2)
    assert generator_states(torch.Generator(), torch.device("cuda", 1))["cuda_device"] == 1
    assert generator_states(torch.Generator(), torch.device("cpu"))["cuda_device"] is None


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_device_of_another_kind_goes_on_with_its_own_state(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[int] = []
    monkeypatch.setattr(getattr(torch, kind), "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(getattr(torch, kind), "set_rng_state", lambda state: given.extend(state.tolist()))
    shuffle = torch.Generator()
    states = restored(json.loads(json.dumps(plain(generator_states(shuffle, torch.device(kind)), "rank-0"))), {})
    restore_generators(states, shuffle, torch.device(kind))
    assert given == [7]
    assert not caplog.messages
    restore_generators(states, shuffle, torch.device("cpu"))
    assert given == [7]
    assert f"the random state of a {kind} device" in caplog.text
    of_before = {name: state for name, state in states.items() if name not in ("cuda_device", "device")}
    restore_generators(of_before, shuffle, torch.device(kind))
    assert given == [7]


def buffered(value: float, *, whose: str, persistent: bool = True, family: str = "llama") -> PPOTrainer:
    """A trainer one of whose models has a buffer of that value, and a whole number beside it."""
    trainer = make_trainer(family)
    model = trainer.ref_model if whose == "reference" else trainer.model
    part = model.pretrained_model.base_model
    part.register_buffer("scale", torch.full((3,), value, dtype=torch.bfloat16), persistent=persistent)
    part.register_buffer("seen", torch.tensor(int(value)), persistent=persistent)
    part.register_buffer("nothing", None)
    return trainer


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_other_buffers_of_the_reference_are_refused(family: str, tmp_path: Path) -> None:
    path = saved(buffered(1.0, whose="reference", family=family), tmp_path / "checkpoint")
    load_checkpoint(buffered(1.0, whose="reference", family=family), path)
    assert_refused(buffered(2.0, whose="reference", family=family), path, "other frozen buffers.*'.*s(cale|een)'")
    assert_refused(make_trainer(family), path, "other frozen buffers.*scale")


def test_a_bias_that_is_a_buffer_belongs_to_the_reference(tmp_path: Path) -> None:
    """BART's kin add one to the logits."""
    path = saved(make_trainer("bart"), tmp_path / "checkpoint")
    other = make_trainer("bart")
    other.ref_model.pretrained_model.final_logits_bias.add_(1)
    assert_refused(other, path, "other frozen buffers.*final_logits_bias")


@pytest.mark.parametrize(("whose", "persistent"), [("policy", True), ("policy", False), ("reference", False)])
def test_buffers_that_are_stored_or_made_anew_keep_nobody_from_going_on(
    whose: str, persistent: bool, tmp_path: Path
) -> None:
    path = saved(buffered(1.0, whose=whose, persistent=persistent), tmp_path / "checkpoint")
    other = buffered(2.0, whose=whose, persistent=persistent)
    load_checkpoint(other, path)
    if persistent:
        assert other.model.pretrained_model.base_model.scale.tolist() == [1.0] * 3


def test_a_checkpoint_that_knows_nothing_of_buffers_is_taken(tmp_path: Path) -> None:
    path = saved(buffered(1.0, whose="reference"), tmp_path / "checkpoint", old=True)
    state = json.loads((path / "state.json").read_text())
    del state["frozen_buffers"]
    (path / "state.json").write_text(json.dumps(state))
    load_checkpoint(buffered(2.0, whose="reference"), path)


# --- damaged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["state.json", "rank-0.json", "policy.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_truncated_file_is_named(file: str, kept: int, tmp_path: Path) -> None:
    path = saved(make_trainer(), tmp_path / "checkpoint")
    (path / file).write_bytes((path / file).read_bytes()[:kept])
    assert_refused(make_trainer(), path, f"{path}.*cannot be read.*remove it and go on from another")
    if file == "state.json":
        with pytest.raises(ValueError, match="cannot be read"):
            steps_done(path)


@pytest.mark.parametrize("field", ["format", "world_size", "frozen", "config", "optimizer", "lr_scheduler", "trainer"])
def test_a_missing_entry_is_named(field: str, tmp_path: Path) -> None:
    path = saved(make_trainer(), tmp_path / "checkpoint")
    change(path, "state.json", lambda state: {name: value for name, value in state.items() if name != field})
    assert_refused(make_trainer(), path, f"state.json has no '{field}'")


@pytest.mark.parametrize("part", ["torch", "python", "numpy", "shuffle"])
def test_a_generator_that_cannot_be_restored_changes_nothing(part: str, tmp_path: Path) -> None:
    path = saved(make_trainer(), tmp_path / "checkpoint")
    change(path, "rank-0.json", lambda held: {"dict": [[name, 7 if name == part else it] for name, it in held["dict"]]})
    assert_refused(make_trainer(), path, f"rank-0.json does not hold: {part} is 7, expected a state of")


# --- where something else is ----------------------------------------------------------------------------------------


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("place", ["file", "folder", "checkpoint and more", "dot", "link", "weights alone"])
def test_nothing_but_a_checkpoint_is_replaced(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    target = tmp_path / "thesis"
    if place == "file":
        target.write_text("notes")
    else:
        target.mkdir()
        (target / "chapters").mkdir()
        (target / "chapters" / "one.txt").write_text("once upon a time")
    if place == "checkpoint and more":
        save_checkpoint(trainer, tmp_path / "made")
        shutil.copytree(tmp_path / "made", target, dirs_exist_ok=True)
    if place == "weights alone":
        shutil.rmtree(target / "chapters")
        (target / "policy.safetensors").write_bytes(b"mine")
    given: str | Path = target
    if place == "dot":
        monkeypatch.chdir(target)
        given = "."
    if place == "link":
        given = tmp_path / "link"
        given.symlink_to(target)
    before = listing(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"thesis (is a file|holds .* directory of its own)"):
            save_checkpoint(trainer, given)
        assert listing(tmp_path) == before


@pytest.mark.parametrize("place", ["empty", "checkpoint", "link", "deep/er"])
def test_an_empty_directory_or_a_checkpoint_is_replaced(place: str, tmp_path: Path) -> None:
    trainer = make_trainer()
    target = tmp_path / place
    if place == "empty":
        target.mkdir()
    if place == "checkpoint":
        save_checkpoint(trainer, target)
    if place == "link":
        target.symlink_to(tmp_path / "real")
        (tmp_path / "real").mkdir()
    trainer.step(*make_batch())
    for _ in range(2):
        assert save_checkpoint(trainer, target) == target
        assert steps_done(target) == 1
    assert not [path for path in listing(tmp_path) if "draft" in path or "previous" in path]


def test_a_directory_that_cannot_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "c").mkdir()
    monkeypatch.setattr(os, "listdir", closed)
    with pytest.raises(ValueError, match=r"c cannot be looked into \(Permission denied\), expected a directory that"):
        files.check_replaceable(tmp_path / "c")


def test_the_working_directory_can_be_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is replaced as a whole, and the process goes on in the new one."""
    trainer = make_trainer()
    target = tmp_path / "c"
    target.mkdir()
    for stepped, given in enumerate((".", target, "../c")):
        monkeypatch.chdir(target)
        assert save_checkpoint(trainer, given).samefile(target)
        assert Path.cwd() == target
        assert steps_done(".") == stepped
        trainer.step(*make_batch())
    assert listing(tmp_path) == ["c", *(f"c/{name}" for name in WRITTEN)]


def test_a_working_directory_that_is_gone_hinders_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert save_checkpoint(make_trainer(), tmp_path / "c") == tmp_path / "c"


THERE = "nothing", "an empty directory", "a checkpoint"
FAILING = {
    "the old one's renaming": ("rename", "c", THERE[1:]),
    "the new one's renaming": ("rename", ".c.draft", THERE),
    "making a draft": ("mkdir", ".c.draft", THERE),
    "waiting for the disk": ("sync", ".c.draft", THERE),
}


@pytest.mark.parametrize(("case", "there"), [(case, there) for case, (*_, all_) in FAILING.items() for there in all_])
def test_a_checkpoint_that_cannot_be_put_in_place_leaves_what_was_there(
    case: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, name, _ = FAILING[case]
    trainer = make_trainer()
    target = tmp_path / "c"
    if there != "nothing":
        target.mkdir()
    if there == "a checkpoint":
        save_checkpoint(trainer, target)
        trainer.step(*make_batch())
    before = listing(tmp_path)
    place: Any = files if what == "sync" else Path
    real = getattr(place, what)

    def fail(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, what, fail)
        with pytest.raises(OSError, match=r"no checkpoint was made in .*c: .*busy.*has room$") as failure:
            save_checkpoint(trainer, target)
    assert failure.value.errno == errno.EBUSY
    assert listing(tmp_path) == before
    if there == "a checkpoint":
        assert steps_done(target) == 0
    save_checkpoint(trainer, target)


def test_a_checkpoint_keeps_the_mode_of_the_one_that_it_replaces(tmp_path: Path) -> None:
    trainer = make_trainer()
    save_checkpoint(trainer, tmp_path / "c").chmod(0o750)
    save_checkpoint(trainer, tmp_path / "c")
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o750


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    with pytest.raises(ValueError, match=r"volume is a mount point.*such as .*volume/checkpoint"):
        save_checkpoint(make_trainer(), tmp_path / "volume")
    assert listing(tmp_path) == ["volume"]
    save_checkpoint(make_trainer(), tmp_path / "volume" / "checkpoint")


@pytest.mark.parametrize("broken", ["mkdir", "rename"])
def test_what_rank_0_cannot_do_is_told_to_the_others(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each error that rank 0 raises is one that it has told before in the collective the others wait in."""
    trainer = make_trainer()
    trainer.world = World(0, 2)
    told: list[bool] = []

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    def gathered(vector: torch.Tensor, world: World, phase: str) -> torch.Tensor:
        told.append(bool(vector[0]))
        own = tmp_path / ".checkpoint.draft" / "rank-0.json"
        if own.exists():
            shutil.copy(own, own.with_name("rank-1.json"))
        theirs = vector.clone()
        theirs[0] = 0
        return torch.stack([vector, theirs])

    monkeypatch.setattr(agreement, "gathered", gathered)
    monkeypatch.setattr(agreement, "gathered_objects", lambda value, world, phase: [value, None])
    monkeypatch.setattr(sealing, "check_there", lambda *_: None)  # the other's files are not
    monkeypatch.setattr(Path, broken, refuse)
    with pytest.raises(OSError, match=r"rank 0: .*no space left"):
        save_checkpoint(trainer, tmp_path / "checkpoint")
    assert told[-1]


def test_an_optimiser_that_finds_its_own_rate_resumes(tmp_path: Path) -> None:
    """It has no learning rate to restore."""

    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"eps": 1e-3})

        def step(self, closure: Any = None) -> None:
            """Do nothing."""

    trainers = [make_trainer(), make_trainer()]
    for trainer in trainers:
        trainer.optimizer = Own(trainer.model.parameters())
    trainers[0].step(*make_batch())
    save_checkpoint(trainers[0], tmp_path / "c")
    load_checkpoint(trainers[1], tmp_path / "c")
    assert trainers[1].current_step == 1


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", ".nfs0001"])
def test_what_a_system_leaves_in_a_directory_ends_no_run(name: str, tmp_path: Path) -> None:
    trainer = make_trainer()
    save_checkpoint(trainer, tmp_path / "c")
    (tmp_path / "c" / name).write_text("")
    save_checkpoint(trainer, tmp_path / "c")
    assert steps_done(tmp_path / "c") == 0


@pytest.mark.parametrize("name", ["policy.safetensors", "rank-0.json"])
def test_a_missing_file_is_named_with_a_remedy(name: str, tmp_path: Path) -> None:
    trainer = make_trainer()
    save_checkpoint(trainer, tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    with pytest.raises(ValueError, match=r"cannot be read .*expected"):
        load_checkpoint(trainer, tmp_path / "c")


def test_a_rollback_takes_its_lines_out_of_open_metrics(tmp_path: Path) -> None:
    trainer = make_trainer(project_kwargs={"logging_dir": str(tmp_path)})

    def go() -> None:
        queries, responses, scores = make_batch()
        stats = trainer.step(queries, responses, scores)
        texts = ["a"] * len(scores)
        trainer.log_stats(stats, {"query": texts, "response": texts}, scores)

    go()
    save_checkpoint(trainer, tmp_path / "c")
    go()
    load_checkpoint(trainer, tmp_path / "c")
    go()
    trainer.close()
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


# --- what is made otherwise --------------------------------------------------------------------------------------


def scheduled(make: Callable[..., Any], *, decay: float = 0.0, lr: Any = 1e-3) -> PPOTrainer:
    trainer = make_trainer(
        optimizer_of=lambda model: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, foreach=False)
    )
    trainer.lr_scheduler = make(trainer.optimizer)
    return trainer


def sequential(steps: int) -> Callable[..., Any]:
    return lambda o: SCHEDULERS.SequentialLR(
        o, [SCHEDULERS.LinearLR(o), SCHEDULERS.CosineAnnealingLR(o, steps)], [steps]
    )


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (
            partial(SCHEDULERS.CosineAnnealingLR, T_max=10),
            partial(SCHEDULERS.CosineAnnealingLR, T_max=20),
            ["lr_scheduler.T_max was 10 and is 20 (the checkpoint's is kept)"],
        ),
        (
            partial(SCHEDULERS.OneCycleLR, max_lr=1e-3, total_steps=5),
            partial(SCHEDULERS.OneCycleLR, max_lr=1e-3, total_steps=9),
            ["lr_scheduler.total_steps was 5 and is 9 (the checkpoint's is kept)"],
        ),
        (
            sequential(3),
            sequential(4),
            [
                "lr_scheduler._milestones was [3] and is [4] (the checkpoint's is kept)",
                "lr_scheduler._schedulers.1.T_max was 3 and is 4 (the checkpoint's is kept)",
            ],
        ),
        (SCHEDULERS.ConstantLR, SCHEDULERS.ConstantLR, []),
        (sequential(3), sequential(3), []),
        (*(partial(SCHEDULERS.OneCycleLR, max_lr=1e-3, total_steps=5),) * 2, []),
        (*(partial(SCHEDULERS.CosineAnnealingWarmRestarts, T_0=2, T_mult=2),) * 2, []),
    ],
)
def test_a_schedule_that_is_made_otherwise_is_the_checkpoints_and_said(
    tmp_path: Path, then: Any, now: Any, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = scheduled(then)
    for seed in range(3):
        trainer.step(*make_batch(seed=seed))
    save_checkpoint(trainer, tmp_path / "c")
    load_checkpoint(scheduled(now), tmp_path / "c")
    advice = ["for another schedule assign trainer.lr_scheduler after load_checkpoint"] if said else []
    start = "the run goes on with other settings than the checkpoint's: "
    assert [text.removeprefix(start) for text in caplog.messages if text.startswith(start)] == (
        ["; ".join(said + advice)] if said else []
    )


def test_another_schedule_is_begun_as_it_is_said(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6]}] * 6

    def made(steps: int) -> PPOTrainer:
        trainer = make_trainer(dataset=rows, project_kwargs={"logging_dir": str(tmp_path)})
        trainer.lr_scheduler = SCHEDULERS.OneCycleLR(trainer.optimizer, 1e-3, total_steps=steps)
        return trainer

    options: Any = {"output_dir": tmp_path, "generation_kwargs": {"max_new_tokens": 2}}
    train(made(5), lambda *_: [0.5] * 6, steps=4, **options)
    with pytest.raises(ValueError, match="A run that is resumed goes on with its checkpoint's schedule: for another"):
        train(made(9), lambda *_: [0.5] * 6, steps=8, resume=True, **options)
    trainer = made(9)
    load_checkpoint(trainer, newest_good(tmp_path))
    trainer.lr_scheduler = SCHEDULERS.OneCycleLR(trainer.optimizer, 1e-3, total_steps=9)
    train(trainer, lambda *_: [0.5] * 6, steps=8, **options)
    assert trainer.current_step == 8


def test_options_that_no_schedule_moves_are_said_beside_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(scheduled(SCHEDULERS.ConstantLR, decay=0.1), tmp_path / "c")
    trainer = scheduled(SCHEDULERS.ConstantLR, decay=0.5)
    load_checkpoint(trainer, tmp_path / "c")
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert "weight_decay of the optimizer was 0.1 and is 0.5 (the checkpoint's is kept)" in caplog.text


@pytest.mark.parametrize("then", [1e-3, torch.tensor(1e-3)])
@pytest.mark.parametrize("now", [1e-3, torch.tensor(1e-3)])
def test_a_rate_that_is_a_tensor_is_no_other_rate(
    tmp_path: Path, then: Any, now: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (
        make_trainer(optimizer_of=lambda model, lr=lr: torch.optim.Adam(model.parameters(), lr=lr, foreach=False))
        for lr in (then, now)
    )
    load_checkpoint(second, save_checkpoint(first, tmp_path / "c"))
    assert "other settings" not in caplog.text


def test_options_of_another_kind_are_no_damage(tmp_path: Path) -> None:
    def made(**options: Any) -> PPOTrainer:
        return make_trainer(optimizer_of=lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-3, **options))

    save_checkpoint(made(), tmp_path / "c")
    with pytest.raises(ValueError, match=r"of eps=\(None, 0.001\), and here it is .*; make the optimizer as it was"):
        load_checkpoint(made(eps=(1e-30, 1e-3)), tmp_path / "c")


def test_a_target_that_was_set_by_hand_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer()
    trainer.kl_ctl.target = 1.5
    save_checkpoint(trainer, tmp_path / "c")
    load_checkpoint(make_trainer(), tmp_path / "c")
    assert "target was 1.5 and is 6.0" in caplog.text


# --- what could never be loaded again ----------------------------------------------------------------------------


class Wrapped(torch.optim.Adam):
    def state_dict(self) -> Any:
        return {"inner": super().state_dict()}


class Listed:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None: ...

    def state_dict(self) -> Any:
        return [1]

    def load_state_dict(self, state: Any) -> None: ...


def wrapped(trainer: PPOTrainer) -> None:
    trainer.optimizer = Wrapped(trainer.model.parameters())


def listed(trainer: PPOTrainer) -> None:
    trainer.lr_scheduler = Listed(trainer.optimizer)


def backwards(trainer: PPOTrainer) -> None:
    trainer.optimizer.param_groups[0]["lr"] = -1e-3


def noted(trainer: PPOTrainer) -> None:
    trainer.optimizer.state[trainer.optimizer.param_groups[0]["params"][0]]["note"] = "mine"


def beyond(trainer: PPOTrainer) -> None:
    trainer.kl_ctl.value = 1e39


def long_text(trainer: PPOTrainer) -> None:
    trainer.optimizer.param_groups[0]["note"] = np.array(["x" * 5000])


@pytest.mark.parametrize(
    ("spoil", "told"),
    {
        wrapped: "optimizer has no 'state'",
        listed: r"lr_scheduler.state_dict\(\) gives a list, expected a dictionary",
        backwards: "the optimizer's lr is -0.001",
        noted: "the optimizer holds numbers that are not finite, or none at all, as note",
        beyond: r"kl_coef is 1e\+39, expected a finite number",
        long_text: "note is a ndarray of <U5000, expected numbers, strings",
    }.items(),
)
def test_no_checkpoint_is_made_that_could_not_be_loaded(tmp_path: Path, spoil: Any, told: str) -> None:
    trainer = make_trainer(dataset=[{"input_ids": [5, 6]}] * 6, project_kwargs={"logging_dir": str(tmp_path / "log")})
    trainer.step(*make_batch())
    save_checkpoint(trainer, tmp_path / "run" / "checkpoint-1")
    spoil(trainer)
    with pytest.raises((TypeError, ValueError), match=told):
        save_checkpoint(trainer, tmp_path / "run" / "checkpoint-1")
    load_checkpoint(make_trainer(dataset=[{"input_ids": [5, 6]}] * 6), tmp_path / "run" / "checkpoint-1")
    with pytest.raises((TypeError, ValueError), match=told):
        train(trainer, lambda *_: [], steps=2, output_dir=tmp_path / "run")
    assert trainer.current_step == 1


def test_what_a_user_has_put_into_an_optimizers_groups_may_be_anything(tmp_path: Path) -> None:
    def made(model: Any) -> torch.optim.Optimizer:
        group = {"params": list(model.parameters()), "most": float("inf"), "seen": [], "calm": True, "left": 3.0}
        return torch.optim.AdamW([group], lr=1e-3)

    trainer = make_trainer(optimizer_of=made)
    trainer.step(*make_batch())
    trainer.optimizer.param_groups[0].update(seen=[1, 2], calm=False, left=2.0)
    del trainer.optimizer.param_groups[0]["most"]
    save_checkpoint(trainer, tmp_path / "c")
    again = make_trainer(optimizer_of=made)
    load_checkpoint(again, tmp_path / "c")
    (group,) = again.optimizer.param_groups
    assert [group[name] for name in ("most", "seen", "calm", "left")] == [float("inf"), [1, 2], False, 2.0]
