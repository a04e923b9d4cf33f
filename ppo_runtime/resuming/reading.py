"""Reading a checkpoint: nothing of it is used before its seal and its records have been checked."""

from pathlib import Path
from typing import Any

from ppo_runtime.common.trees import read_back, restored
from ppo_runtime.resuming import files
from ppo_runtime.resuming.fields import RecordT, check_complete, record
from ppo_runtime.resuming.files import damaged
from ppo_runtime.resuming.records import RankRecord, StateRecord, TrainerRecord
from ppo_runtime.resuming.sealing import Manifest, check_sealed, read_manifest


def steps_done(directory: str | Path) -> int | None:
    """How many steps a checkpoint stands after; None if there is none of this name.

    Raises:
        ValueError: there is one, and it is damaged as far as it was looked at: its weights were not.
    """
    try:
        source = files.existing(files.resolved(directory))
    except FileNotFoundError:
        return None
    manifest = read_manifest(source)
    if manifest is not None:
        check_sealed(source, manifest, [files.STATE])
    return read_trainer(source, read_state(source, manifest))["current_step"]


def run_of(directory: str | Path) -> str | None:
    """The name of the part of a run that has made a checkpoint."""
    source = files.existing(files.resolved(directory))
    return read_state(source, read_manifest(source)).run


def runs_in(directory: str | Path) -> set[str | None]:
    """The names of the parts of a run that led to a checkpoint; None among them for one of before names."""
    source = files.existing(files.resolved(directory))
    state = read_state(source, read_manifest(source))
    return {state.run, *state.earlier_runs}


def check_whole(source: Path, *, every_byte: bool) -> int:
    """Look at everything in a checkpoint, as far as that takes no trainer; gives the steps it stands after.

    Args:
        source: the checkpoint.
        every_byte: also at what its files of tensors hold.

    Raises:
        ValueError: something is not as it was written.
    """
    manifest = read_manifest(source)
    texts = None if every_byte or manifest is None else [name for name in manifest.files if name.endswith(".json")]
    check_sealed(source, manifest, texts)
    state = read_state(source, manifest)
    for rank in range(state.world_size):
        read_rank(source, state, rank)
    if manifest is None and every_byte:
        for name in (files.POLICY, files.OPTIMIZER):
            files.read_tensors(source / name)
    return read_trainer(source, state)["current_step"]


def read_state(source: Path, manifest: Manifest | None) -> StateRecord:
    """What ``state.json`` holds, of a format that we know and with all that it must have.

    Args:
        source: the checkpoint.
        manifest: of it.
    """
    held = files.read_json(source / files.STATE)
    found = files.format_of(source, held)
    state = read_record(source, StateRecord, held, files.STATE, complete=found in (files.FORMAT, files.IN_PARTS))
    if state.format != (1 if manifest is None else manifest.format):
        raise damaged(source, f"{files.STATE} is of format {state.format}")
    if manifest is not None and manifest.ranks != state.world_size:
        raise damaged(source, f"{files.STATE} is of {state.world_size} ranks, and there are files of {manifest.ranks}")
    return state


def read_trainer(source: Path, state: StateRecord) -> dict[str, Any]:
    """The state of the trainer itself."""
    own = read_tree(source, state, state.trainer, "trainer")
    read_record(source, TrainerRecord, own, "trainer", complete=state.format > 1)
    return own


def read_rank(source: Path, state: StateRecord, rank: int) -> dict[str, Any]:
    """What a rank had for itself."""
    name = files.rank_file(rank)
    held = files.read_json(source / name)
    own = read_tree(source, state, held, name.removesuffix(".json"))
    read_record(source, RankRecord, own, name, complete=state.format > 1)
    return own


def read_tree(source: Path, state: StateRecord, value: Any, where: str, tensors: Any = None) -> Any:
    """A tree of plain values; one of the present format must be as it is written."""
    if value is None:
        return None
    try:
        return read_back(value, where, tensors) if state.format > 1 else restored(value, tensors or {})
    except (TypeError, ValueError) as error:
        raise damaged(source, f"{where}: {error}") from error


def read_record(source: Path, kind: type[RecordT], held: Any, where: str, *, complete: bool = False) -> RecordT:
    """A record, whose misfits are damage to the checkpoint."""
    try:
        made = record(kind, held, where)
        if complete:
            check_complete(kind, held, where)
    except ValueError as error:
        raise damaged(source, str(error)) from error
    return made
