"""A checkpoint of which every rank writes its own rows: gone on from by any number of ranks, and never half believed.

Run as a script, this file is one of two or three processes.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import resource
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from ppo_runtime import PPOTrainer
from ppo_runtime.checkpoint import load_checkpoint, newest_good, save_checkpoint, save_in, steps_done
from ppo_runtime.ranks.presence import RankLost
from ppo_runtime.ranks.shards import whole
from ppo_runtime.ranks.world import world_from_environment
from ppo_runtime.resuming import files, parts
from tests.runtime.ranks.test_parallel import assert_same_bits
from tests.runtime.support.divided import need_divided_models
from tests.runtime.support.processes import ends_of_ranks, run_ranks
from tests.runtime.support.sealing import change, seal_again
from tests.runtime.support.tiny import tiny_lora
from tests.runtime.support.trainers import make_batch, untimed
from tests.runtime.support.trainers import make_trainer as any_trainer
from tests.runtime.training.test_checkpoint_misfits import assert_refused
from tests.runtime.training.test_checkpoint_seals import SEALABLE, flipped

SEQUENCES = 6
OURS = [f"shard-0000{rank}-model-00002-of-00002.safetensors" for rank in (1, 2)]
COUNTS = "shard-00002-model-00001-of-00002.safetensors"
"""What all ranks hold; the one writes it that has the fewest rows."""
WRITTEN = [files.MANIFEST, "rank-0.json", "rank-1.json", COUNTS, *OURS, files.STATE]


def make_trainer(ranks: int, parallelism: str = "fsdp2", **given: Any) -> PPOTrainer:
    """One rank's, of those that share six sequences."""
    size = SEQUENCES // ranks
    return any_trainer(
        batch_size=size,
        mini_batch_size=size,
        ppo_epochs=2,
        adam_eps=1e-4,
        parallelism=parallelism,
        **given,
    )


def stepped(trainer: PPOTrainer, seed: int) -> dict[str, Any]:
    """What a step on this rank's rows leaves of all ranks."""
    rank, size = trainer.world.rank, SEQUENCES // trainer.world.size
    stats = trainer.step(*(part[rank * size : (rank + 1) * size] for part in make_batch(SEQUENCES, seed=seed)))
    return {"weights": weights_of(trainer), "stats": untimed(stats)}


def weights_of(trainer: PPOTrainer) -> dict[str, Any]:
    return {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def went_on(path: Path, ranks: int, parallelism: str, **given: Any) -> dict[str, Any]:
    """What a checkpoint holds, and a step from there."""
    trainer = make_trainer(ranks, parallelism, **given)
    load_checkpoint(trainer, path)
    return {"loaded": weights_of(trainer), **stepped(trainer, 2)}


# --- what the ranks do ------------------------------------------------------------------------------------------------


def of_three(folder: Path) -> dict[str, Any]:
    """Rows that three ranks do not share equally, and a bias of which two have none."""
    trainer = make_trainer(3)
    stepped(trainer, 1)
    save_checkpoint(trainer, folder / "of three")
    return {"saved": weights_of(trainer), **stepped(trainer, 2)}


def of_two(folder: Path) -> dict[str, Any]:
    rank, heard = dist.get_rank(), Heard()
    logging.basicConfig(level=logging.INFO, handlers=[heard])
    straight = make_trainer(2)
    stepped(straight, 0)
    save_in(folder / "run", straight)
    stepped(straight, 1)
    with mock.patch.object(DTensor, "full_tensor") as gathered:
        save_in(folder / "run", straight)
    found: dict[str, Any] = {"gathered": gathered.call_count, "saved": weights_of(straight)}
    path = folder / "run" / "checkpoint-2"
    with mock.patch.object(parts, "_LARGEST", 2000):
        save_checkpoint(straight, folder / "in many files")
    found["full"] = full_disk(straight, path)
    found["straight"] = stepped(straight, 2)
    found |= {name: went_on(path, 2, name) for name in ("fsdp2", "ddp")}
    found["many"] = went_on(folder / "in many files", 2, "fsdp2")
    found["three"] = went_on(folder / "of three", 2, "fsdp2")
    found["one"] = went_on(folder / "of one", 2, "fsdp2")
    found["adapter"] = adapter(folder / "adapter")
    found["damaged"] = damaged(straight, path, folder / "damaged", rank)
    return found | {"heard": heard.said}


class Heard(logging.Handler):
    """What a user hears of torch, who lets all packages speak."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        if record.name.startswith("torch"):
            self.said.append(f"{record.name}: {record.getMessage()}")


def adapter(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step after a save, by the trainer that made it and by another."""
    given: dict[str, Any] = {"family": "gpt2", "peft_config": tiny_lora()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, which peft calls
        trainer = make_trainer(2, **given)
        stepped(trainer, 0)
        save_checkpoint(trainer, path)
        return stepped(trainer, 2), went_on(path, 2, "fsdp2", **given)


def full_disk(trainer: PPOTrainer, path: Path) -> str:
    """What a rank says of a save for which the second has no room."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trainer.world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="no checkpoint was made") as caught:
            save_checkpoint(trainer, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return str(caught.value)


def damaged(trainer: PPOTrainer, path: Path, copy: Path, rank: int) -> list[str]:
    """What a rank says of a checkpoint in which one file after the other has changed."""
    said = []
    before = weights_of(trainer)
    for file in WRITTEN:
        if rank == 0:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(path, copy)
            content = (copy / file).read_bytes()
            (copy / file).write_bytes(flipped(content, 8 * len(content) - 1))  # of a tensor, not of a header
        dist.barrier()
        with pytest.raises(ValueError, match="cannot be read") as caught:
            load_checkpoint(trainer, copy)
        said.append(str(caught.value))
        dist.barrier()
    torch.testing.assert_close(weights_of(trainer), before, rtol=0, atol=0)
    return said


def be_one_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    world = world_from_environment()
    if (folder / "dies").exists():
        lost(folder)
    results = of_three(folder) if world.size == 3 else of_two(folder)
    torch.save(results, folder / f"{world.rank}.pt")
    dist.destroy_process_group()


def lost(folder: Path) -> None:
    """The second rank ends while it writes its part."""
    trainer = make_trainer(2)
    stepped(trainer, 0)
    if trainer.world.rank == 1:
        with mock.patch("safetensors.torch.save", side_effect=lambda *_, **__: os._exit(3)):
            save_checkpoint(trainer, folder / "checkpoint")
    with pytest.raises(RankLost) as caught:
        save_checkpoint(trainer, folder / "checkpoint")
    (folder / "said").write_text(str(caught.value))
    os._exit(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks write."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process does, which saves whole tensors."""
    trainer = make_trainer(1, "ddp")
    stepped(trainer, 0)
    stepped(trainer, 1)
    save_checkpoint(trainer, folder / "of one")
    return stepped(trainer, 2)


@pytest.fixture(scope="module")
def three(folder: Path) -> list[dict[str, Any]]:
    """What three ranks did."""
    need_divided_models()
    return run_ranks(__file__, folder, ranks=3)


@pytest.fixture(scope="module")
def two(folder: Path, three: list[dict[str, Any]], alone: dict[str, Any]) -> list[dict[str, Any]]:
    """What two ranks did then."""
    return run_ranks(__file__, folder)


@pytest.fixture
def run(folder: Path, two: list[dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of a run of two ranks that can be damaged."""
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def trainer() -> PPOTrainer:
    """One of a single process, that only refuses."""
    return make_trainer(1, "ddp")


# --- going on ---------------------------------------------------------------------------------------------------------


def test_the_same_ranks_go_on_bit_for_bit(two: list[dict[str, Any]]) -> None:
    """Also where each rank has written many files, and where an adapter trains."""
    for found in two:
        assert_same_bits(*found["adapter"])
        assert_same_bits(found["fsdp2"], found["straight"])
        assert_same_bits(found["many"], found["straight"])


@pytest.mark.parametrize("name", ["ddp", "alone"])
def test_whoever_holds_everything_goes_on_from_parts(name: str, two: list[dict[str, Any]], folder: Path) -> None:
    expected = two[0]
    found = went_on(folder / "run" / "checkpoint-2", 1, "ddp") if name == "alone" else expected[name]
    torch.testing.assert_close(found["loaded"], expected["saved"], rtol=0, atol=0)
    torch.testing.assert_close(found["weights"], expected["straight"]["weights"], rtol=1e-5, atol=1e-5)


def test_another_number_of_ranks_goes_on_from_parts(
    two: list[dict[str, Any]], three: list[dict[str, Any]], folder: Path
) -> None:
    for found in (two[0]["three"], went_on(folder / "of three", 1, "ddp")):
        torch.testing.assert_close(found["loaded"], three[0]["saved"], rtol=0, atol=0)
        torch.testing.assert_close(found["weights"], three[0]["weights"], rtol=1e-5, atol=1e-5)


def test_ranks_with_parts_go_on_from_whole_tensors(two: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    torch.testing.assert_close(two[0]["one"]["weights"], alone["weights"], rtol=1e-5, atol=1e-5)


def test_any_torch_goes_on_from_parts(alone: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Also one that divides no models: of parts as torch writes them, two in a checkpoint of one rank."""
    path = Path(shutil.copytree(folder / "of one", tmp_path / "of one"))
    tensors = {f"policy.{name}": x for name, x in load_file(path / files.POLICY).items()}
    tensors |= load_file(path / files.OPTIMIZER)
    (path / files.POLICY).unlink()
    (path / files.OPTIMIZER).unlink()
    cut = {name: len(x) // 2 if x.ndim else 0 for name, x in tensors.items()}
    first = {name: x[: cut[name]].clone() for name, x in tensors.items() if cut[name]}
    second = {name: x[cut[name] :].clone() if x.ndim else x for name, x in tensors.items()}
    for file, held, begins in ((OURS[0], first, dict.fromkeys(first, 0)), (OURS[1], second, cut)):
        places = {name: {"saved_offsets": [begins[name], 0, 0, 0][: x.ndim]} for name, x in held.items()}
        save_file(held, path / file, {"DCP_SHARDING_INFO": json.dumps(places), "format": "pt"})
    change(path, files.STATE, lambda held: held | {"format": files.IN_PARTS})
    assert_same_bits(went_on(path, 1, "ddp"), alone)


def test_no_rank_holds_or_writes_more_than_its_share(two: list[dict[str, Any]], folder: Path) -> None:
    assert [found["gathered"] for found in two] == [0, 0]
    sizes = [(folder / "run" / "checkpoint-2" / name).stat().st_size for name in OURS]
    assert max(sizes) < 0.6 * sum(sizes)
    assert len(list((folder / "in many files").glob("shard-*"))) > 4


def test_it_is_one_checkpoint_of_files_that_everybody_reads(run: Path) -> None:
    path = run / "checkpoint-2"
    assert sorted(file.name for file in path.iterdir()) == sorted(WRITTEN)
    manifest = json.loads((path / files.MANIFEST).read_text())["content"]
    assert sorted(manifest["files"]) == sorted(name for name in WRITTEN if name != files.MANIFEST)
    assert json.loads((path / files.STATE).read_text())["format"] == files.IN_PARTS
    assert steps_done(path) == 2
    assert newest_good(run) == path


def test_torch_has_nothing_to_say(two: list[dict[str, Any]], three: list[dict[str, Any]]) -> None:
    """Nor does it warn: that would have been an error."""
    assert [found["heard"] for found in two] == [[], []]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_two_ranks_refuse_what_one_of_them_finds(two: list[dict[str, Any]]) -> None:
    """Each looks at its share of the files, and all raise the same."""
    assert two[0]["damaged"] == two[1]["damaged"]
    for file, said in zip(WRITTEN, two[0]["damaged"], strict=True):
        assert file in said
    assert two[0]["damaged"][WRITTEN.index(OURS[1])].startswith("rank 1: ")


def test_a_rank_without_room_leaves_the_checkpoint_before(two: list[dict[str, Any]], run: Path) -> None:
    assert two[0]["full"] == two[1]["full"]
    assert re.match(
        r"rank 1: \[Errno \d+\] no checkpoint was made in .*/checkpoint-2: .*File too large", two[0]["full"]
    )
    assert newest_good(run) == run / "checkpoint-2"
    assert not list(run.glob(".*"))


def test_a_rank_that_ends_while_it_writes_is_named(two: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "dies").touch()
    ends = ends_of_ranks([sys.executable, "-W", "error", __file__, str(tmp_path)], limit=240)
    assert [ended.code for ended in ends] == [4, 3], ends
    said = (tmp_path / "said").read_text()
    assert "rank 1 was lost: the process has ended. The others waited in the writing of all ranks' parts" in said
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("file", WRITTEN)
@pytest.mark.parametrize("damage", ["cut in half", "missing", "a bit", "of another save"])
def test_a_damaged_file_is_found_and_the_one_before_used(
    file: str, damage: str, run: Path, trainer: PPOTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    path = run / "checkpoint-2" / file
    content = path.read_bytes()
    bit = random.Random(file).randrange(8 * len(content))
    path.unlink()
    if damage == "cut in half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "a bit":
        path.write_bytes(flipped(content, bit))
    elif damage == "of another save":
        shutil.copy(run / "checkpoint-1" / file, path)
    caplog.set_level(logging.WARNING)
    assert_refused(trainer, run / "checkpoint-2", "checkpoint-2 cannot be read")
    assert newest_good(run) == run / "checkpoint-1"
    assert "a damaged checkpoint is left out" in caplog.text


# --- hostile files, sealed as if they were ours -----------------------------------------------------------------------


@pytest.mark.parametrize("attack", SEALABLE, ids=lambda attack: attack.__name__)
def test_a_seal_makes_no_hostile_file_a_good_one(
    attack: Callable[[Path], None], run: Path, monkeypatch: pytest.MonkeyPatch, trainer: PPOTrainer
) -> None:
    monkeypatch.chdir(run.parent)
    attack(run / "checkpoint-2" / OURS[1])
    seal_again(run / "checkpoint-2")
    assert_refused(trainer, run / "checkpoint-2", rf"checkpoint-2 cannot be read \({OURS[1]}")
    assert not Path("exploded").exists()


def test_no_link_is_followed(run: Path, trainer: PPOTrainer) -> None:
    path = run / "checkpoint-2" / OURS[1]
    path.rename(run / "elsewhere")
    path.symlink_to(run / "elsewhere")
    assert_refused(trainer, run / "checkpoint-2", rf"checkpoint-2 cannot be read \({OURS[1]} is a link")


def rewritten(path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Change the tensors of a file and where they belong, and seal the checkpoint again."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, places = load_file(path), json.loads(metadata["DCP_SHARDING_INFO"])
    info = edit(tensors, places)
    save_file(tensors, path, metadata | {"DCP_SHARDING_INFO": json.dumps(places) if info is None else info})
    seal_again(path.parent)


def first_of(tensors: dict[str, Any]) -> str:
    return next(name for name, x in sorted(tensors.items()) if x.ndim == 2)


def moved(to: Any) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    def edit(tensors: dict[str, Any], places: dict[str, Any]) -> None:
        places[first_of(tensors)]["saved_offsets"] = to

    return edit


def shortened(tensors: dict[str, Any], places: dict[str, Any]) -> None:
    tensors[first_of(tensors)] = tensors[first_of(tensors)][:-1].contiguous()


def of_another_dtype(tensors: dict[str, Any], places: dict[str, Any]) -> None:
    tensors[first_of(tensors)] = tensors[first_of(tensors)].double()


def of_other_columns(tensors: dict[str, Any], places: dict[str, Any]) -> None:
    tensors[first_of(tensors)] = tensors[first_of(tensors)][:, :-1].contiguous()


def left_out(tensors: dict[str, Any], places: dict[str, Any]) -> None:
    del tensors[first_of(tensors)]


def infinite(tensors: dict[str, Any], places: dict[str, Any]) -> None:
    tensors[first_of(tensors)][0, 0] = torch.inf


EDITS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "over the first part": (moved([0, 0]), "do not follow each other"),
    "beyond a hole": (moved([10**6, 0]), "do not follow each other"),
    "before the beginning": (moved([-1, 0]), "do not follow each other"),
    "along another axis": (moved([0, 1]), "do not follow each other"),
    "too many numbers": (moved([0, 0, 0]), "do not follow each other"),
    "no number": (moved([True, 0]), "begins at"),
    "no list": (moved(None), OURS[1]),
    "no places": (lambda *_: "[]", OURS[1]),
    "no JSON": (lambda *_: "[" * 10**5, OURS[1]),
    "places of nothing": (lambda *_: "{}", OURS[1]),
    "fewer rows": (shortened, "in the checkpoint and .* in the model|of shape .* for a parameter of shape"),
    "another dtype": (of_another_dtype, "do not follow each other"),
    "other columns": (of_other_columns, "do not follow each other"),
    "no rows": (left_out, "in the checkpoint and .* in the model|of shape .* for a parameter of shape"),
    "no finite number": (infinite, "numbers that are not finite"),
}


@pytest.mark.parametrize("name", EDITS)
def test_parts_that_make_up_no_tensor_are_refused(name: str, run: Path, trainer: PPOTrainer) -> None:
    edit, message = EDITS[name]
    rewritten(run / "checkpoint-2" / OURS[1], edit)
    assert_refused(trainer, run / "checkpoint-2", message)


def test_a_part_that_is_there_twice_is_refused(run: Path, trainer: PPOTrainer) -> None:
    """With fewer rows none overlap, and torch would read either."""

    def emptied(tensors: dict[str, Any], places: dict[str, Any]) -> None:
        tensors[first_of(tensors)] = tensors[first_of(tensors)][:0]
        places[first_of(tensors)]["saved_offsets"] = [0, 0]

    rewritten(run / "checkpoint-2" / OURS[1], emptied)
    assert_refused(trainer, run / "checkpoint-2", "is there twice")


@pytest.mark.parametrize("name", ["more.safetensors", "shard-00003-model-00001-of-00001.safetensors"])
def test_a_file_of_somebody_elses_is_left_alone(name: str, run: Path, trainer: PPOTrainer) -> None:
    shutil.copy(run / "checkpoint-1" / OURS[0], run / "checkpoint-2" / name)
    assert newest_good(run) == run / "checkpoint-2"
    load_checkpoint(make_trainer(1, "ddp"), run / "checkpoint-2")


@pytest.mark.parametrize("missing", [[files.STATE, files.MANIFEST], [name for name in WRITTEN if name not in OURS]])
def test_parts_alone_are_a_damaged_checkpoint(
    missing: list[str], run: Path, trainer: PPOTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    for name in missing:
        (run / "checkpoint-2" / name).unlink()
    assert_refused(trainer, run / "checkpoint-2", "checkpoint-2 cannot be read")
    assert newest_good(run) == run / "checkpoint-1"
    assert "a damaged checkpoint is left out" in caplog.text


def test_moments_are_fitted_before_they_take_memory(
    run: Path, trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more_rows(tensors: dict[str, Any], places: dict[str, Any]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith("exp_avg") and tensors[name].ndim == 2)
        tensors[name] = torch.cat([tensors[name]] * 3)

    rewritten(run / "checkpoint-2" / OURS[1], more_rows)
    monkeypatch.setattr(parts, "read", mock.Mock(side_effect=AssertionError))
    assert_refused(trainer, run / "checkpoint-2", "holds exp_avg of shape .* for a parameter of shape")


def test_no_memory_is_no_damage(run: Path, trainer: PPOTrainer) -> None:
    with (
        mock.patch(
            "torch.distributed.checkpoint.hf_storage.HuggingFaceStorageReader.read_data", side_effect=MemoryError
        ),
        pytest.raises(MemoryError),
    ):
        load_checkpoint(trainer, run / "checkpoint-2")


def test_a_huge_tensor_takes_no_memory(run: Path, trainer: PPOTrainer) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (run / "checkpoint-2" / OURS[1]).write_bytes(struct.pack("<Q", len(header)) + header)
    seal_again(run / "checkpoint-2")
    assert_refused(trainer, run / "checkpoint-2", rf"checkpoint-2 cannot be read \({OURS[1]}")


def test_formats_do_not_mix(run: Path, trainer: PPOTrainer) -> None:
    change(run / "checkpoint-2", files.STATE, lambda held: held | {"format": files.FORMAT})
    assert_refused(trainer, run / "checkpoint-2", "state.json is of format 2")


def test_a_later_version_is_told_from_damage(run: Path, trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "IN_PARTS", 2)
    assert_refused(trainer, run / "checkpoint-2", "has format 3, expected at most 2: a later version has made it")


def test_a_torch_without_ranks_says_so(run: Path, trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert_refused(trainer, run / "checkpoint-2", "built without torch.distributed")


if __name__ == "__main__":
    be_one_rank(Path(sys.argv[1]))
