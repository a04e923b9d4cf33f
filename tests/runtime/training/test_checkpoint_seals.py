"""Damage and malice: whatever has become of a checkpoint's files is found by name before the trainer changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_runtime import PPOTrainer, checkpoint
from ppo_runtime.checkpoint import load_checkpoint, newest_good, save_checkpoint, save_in, steps_done
from ppo_runtime.resuming import files
from ppo_runtime.resuming.keeping import check_storable
from tests.runtime.support.sealing import change, make_old, seal_again
from tests.runtime.support.trainers import make_batch, make_trainer
from tests.runtime.training.test_checkpoint_misfits import WRITTEN, assert_refused


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of two steps."""
    output = tmp_path_factory.mktemp("run")
    trainer = make_trainer()
    for _ in range(2):
        trainer.step(*make_batch())
        save_in(output, trainer)
    return output


@pytest.fixture
def run(two: Path, tmp_path: Path) -> Path:
    """A copy of it that can be damaged."""
    return Path(shutil.copytree(two, tmp_path / "run"))


@pytest.fixture(scope="module")
def trainer() -> PPOTrainer:
    """One that only refuses."""
    return make_trainer()


def flipped(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ (1 << bit % 8)]) + content[bit // 8 + 1 :]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", WRITTEN)
@pytest.mark.parametrize("damage", ["cut to nothing", "cut in half", "a byte short", "a byte more", "missing"])
def test_a_file_of_another_length_is_found_and_the_one_before_used(
    file: str, damage: str, run: Path, trainer: PPOTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    path = run / "checkpoint-2" / file
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        half = {"cut to nothing": b"", "cut in half": whole[: len(whole) // 2], "a byte short": whole[:-1]}
        path.write_bytes(half.get(damage, whole + b" "))
    assert_refused(trainer, run / "checkpoint-2", f"checkpoint-2 cannot be read .*{file}.*remove it and go on from")
    assert newest_good(run) == run / "checkpoint-1"
    assert f"{file}" in caplog.text


@pytest.mark.parametrize("file", WRITTEN)
def test_a_bit_that_has_changed_is_found_and_the_one_before_used(file: str, run: Path, trainer: PPOTrainer) -> None:
    path = run / "checkpoint-2" / file
    whole = path.read_bytes()
    draw = random.Random(0)
    bits = {0, 8 * len(whole) - 1, *(draw.randrange(8 * len(whole)) for _ in range(20))}
    for bit in bits:
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(ValueError, match=rf"checkpoint-2 cannot be read .*{file}"):
            load_checkpoint(trainer, run / "checkpoint-2")
        assert newest_good(run) == run / "checkpoint-1"
    assert trainer.current_step == 0


def test_every_kind_of_bit_of_a_manifest_counts(run: Path, trainer: PPOTrainer) -> None:
    path = run / "checkpoint-2" / files.MANIFEST
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(ValueError, match=r"checkpoint-2 cannot be read .*manifest.json"):
            steps_done(run / "checkpoint-2")


@pytest.mark.parametrize("file", [name for name in WRITTEN if name != files.MANIFEST])
def test_files_of_two_saves_do_not_mix(file: str, run: Path, trainer: PPOTrainer) -> None:
    shutil.copy(run / "checkpoint-1" / file, run / "checkpoint-2" / file)
    assert_refused(trainer, run / "checkpoint-2", rf"checkpoint-2 cannot be read \({file} ")


def test_where_all_are_damaged_nothing_begins_anew(run: Path) -> None:
    for path in run.iterdir():
        (path / files.POLICY).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: .*checkpoint-2.*; .*checkpoint-1"):
        newest_good(run)


def test_a_checkpoint_of_before_loads_and_is_said_to_have_no_checksums(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_old(run / "checkpoint-2")
    other = make_trainer()
    load_checkpoint(other, run / "checkpoint-2")
    assert other.current_step == 2
    assert "carries no checksums" in caplog.text
    assert newest_good(run) == run / "checkpoint-2"


def test_a_manifest_that_is_gone_does_not_make_it_one_of_before(
    run: Path, trainer: PPOTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoint-2" / files.MANIFEST).unlink()
    assert_refused(trainer, run / "checkpoint-2", r"manifest\.json is missing")
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        steps_done(run / "checkpoint-2")
    assert newest_good(run) == run / "checkpoint-1"
    assert "earlier version" not in caplog.text


@pytest.mark.parametrize("manifest", ["with one file more", "of another kind", "none"])
def test_a_checkpoint_of_a_later_version_is_not_called_damaged(
    manifest: str, run: Path, trainer: PPOTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    source = run / "checkpoint-2"
    (source / "shard-0.safetensors").write_bytes(b"")
    change(source, files.STATE, lambda state: state | {"format": files.IN_PARTS + 1})
    if manifest == "of another kind":
        (source / files.MANIFEST).write_text('["another"]')
    elif manifest == "none":
        (source / files.MANIFEST).unlink()
    assert_refused(trainer, source, f"has format {files.IN_PARTS + 1}.*a later version has made it")
    with pytest.raises(ValueError, match="a later version has made it"):
        steps_done(source)
    assert newest_good(run) == run / "checkpoint-1"
    assert "earlier version" not in caplog.text


@pytest.mark.parametrize("when", ["before a run", "before a save", "in a save"])
def test_no_state_is_written_that_could_not_be_read(when: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that keeps its whole schedule, say."""
    trainer = make_trainer()
    scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)
    trainer.lr_scheduler = scheduler
    save_in(run, trainer)
    scheduler.planned = list(range(100000))  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(files, "LONGEST", 100000)
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    if when == "in a save":
        monkeypatch.setattr(checkpoint, "check_worth_keeping", lambda _: None)
    keep = check_storable if when == "before a run" else lambda it: save_checkpoint(it, run / "checkpoint-0")
    with pytest.raises(ValueError, match=r"state\.json would have \d+ bytes, \d+ of them for 'lr_scheduler'.* 100000"):
        keep(trainer)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    assert steps_done(run / "checkpoint-0") == 0


# --- malice -----------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a trace."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def pickled_by_torch(path: Path) -> None:
    torch.save({"a": Bomb()}, path)


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b'{"a"')


def large_header(path: Path) -> None:
    """Of 8 GiB, in a file as long as that says, which has no blocks."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**33 + 16)


def long_text(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"[")
        file.truncate(2**33)


def nested(path: Path) -> None:
    path.write_bytes(b"[" * 10**6)


def many_digits(path: Path) -> None:
    path.write_bytes(b'{"format": ' + b"9" * 10**6 + b"}")


def link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def link_to_a_secret(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HOSTILE: list[Callable[[Path], None]] = [
    pickled,
    pickled_by_torch,
    huge_header,
    large_header,
    long_text,
    nested,
    many_digits,
    link,
    link_to_a_secret,
    endless,
    pipe,
    folder,
]


@contextmanager
def little_memory() -> Iterator[None]:
    """What is allocated beyond some hundred MiB more than now fails."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("old", [False, True], ids=["sealed", "of before"])
@pytest.mark.parametrize("file", WRITTEN)
@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
def test_a_hostile_file_is_refused_by_name_and_nothing_runs(
    attack: Callable[[Path], None],
    file: str,
    old: bool,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainer: PPOTrainer,
) -> None:
    """Without waiting for a pipe, reading an endless file or taking the memory that a header asks for."""
    monkeypatch.chdir(run.parent)
    if old:
        make_old(run / "checkpoint-2")
        if file == files.MANIFEST:
            (run / "checkpoint-2" / file).write_text("{}")
    attack(run / "checkpoint-2" / file)
    with little_memory():
        with pytest.raises(ValueError, match=rf"checkpoint-2 cannot be read \({file}"):
            load_checkpoint(trainer, run / "checkpoint-2")
        assert newest_good(run) == run / "checkpoint-1"
    assert trainer.current_step == 0
    assert not Path("exploded").exists()


SEALABLE = [pickled, pickled_by_torch, huge_header, nested, many_digits]


@pytest.mark.parametrize("file", [name for name in WRITTEN if name != files.MANIFEST])
@pytest.mark.parametrize("attack", SEALABLE, ids=lambda attack: attack.__name__)
def test_a_seal_makes_no_hostile_file_a_good_one(
    attack: Callable[[Path], None], file: str, run: Path, monkeypatch: pytest.MonkeyPatch, trainer: PPOTrainer
) -> None:
    monkeypatch.chdir(run.parent)
    attack(run / "checkpoint-2" / file)
    seal_again(run / "checkpoint-2")
    assert_refused(trainer, run / "checkpoint-2", rf"checkpoint-2 cannot be read \({file}")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/passwd", "rank-0.json/../../x", "rank-00.json", "rank-7.json"]
)
def test_a_manifest_leads_nowhere_else(name: str, run: Path, trainer: PPOTrainer) -> None:
    (run / "outside.json").write_text("{}")
    path = run / "checkpoint-2" / files.MANIFEST
    held = json.loads(path.read_text())["content"]
    held["files"][name] = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    sealed = {"content": held, "sha256": hashlib.sha256(files.as_json(held).encode()).hexdigest()}
    path.write_text(files.as_json(sealed))
    assert_refused(trainer, run / "checkpoint-2", r"checkpoint-2 cannot be read \(manifest.json lists")


@pytest.mark.parametrize("dtype", ["O", "U1000000000", "(1000000000,)f8", "f8,(1000000000,)f8", "M8[s]", "float128"])
def test_an_array_of_any_dtype_takes_no_memory(dtype: str, run: Path, trainer: PPOTrainer) -> None:
    def edit(held: Any) -> None:
        fields = dict(held["dict"])
        fields["numpy"]["tuple"][1] = {"array": ["a"], "dtype": dtype, "shape": [1]}

    change(run / "checkpoint-2", "rank-0.json", edit)
    with little_memory():
        assert_refused(trainer, run / "checkpoint-2", r"checkpoint-2 cannot be read \(rank-0: ")


def test_a_field_of_weights_that_are_not_finite_is_refused_also_without_checksums(
    run: Path, trainer: PPOTrainer
) -> None:
    make_old(run / "checkpoint-2")
    path = run / "checkpoint-2" / files.POLICY
    tensors = files.read_tensors(path)
    name = next(iter(tensors))
    files.write_tensors(path, tensors | {name: torch.full_like(tensors[name], torch.inf)})
    assert_refused(trainer, run / "checkpoint-2", f"{name} holds numbers that are not finite")


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 1, 1000, 4000, 8000, 20000])
def test_a_disk_that_fills_leaves_the_checkpoint_before(room: int, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No file may grow beyond some bytes, as on a disk that has only them."""
    caplog.set_level(logging.CRITICAL)
    trainer = make_trainer()
    load_checkpoint(trainer, run / "checkpoint-2")
    trainer.step(*make_batch())
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        for path in (run / "checkpoint-3", run / "checkpoint-2"):
            with pytest.raises(OSError, match=rf"no checkpoint was made in .*{path.name}: .*has room"):
                save_checkpoint(trainer, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert newest_good(run) == run / "checkpoint-2"
    assert steps_done(save_in(run, trainer)) == 3
