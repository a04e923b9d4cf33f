"""Tensors of which every rank writes its own rows, and reads those it needs: torch's distributed checkpoints.

The files are safetensors, some of each rank, whose headers say where in the whole tensor their rows belong. Any number
of ranks can read them, in parts or whole. Torch opens none before its header has been checked here.
"""

import json
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ppo_runtime.ranks.presence import lost_ranks_named
from ppo_runtime.ranks.shards import in_rows, is_shard, whole
from ppo_runtime.ranks.world import World
from ppo_runtime.resuming import files
from ppo_runtime.resuming.files import damaged

_LARGEST = 2**30
"""Bytes of a file, as long as it holds more than one tensor: torch makes each in memory."""


def write(tensors: Mapping[str, Tensor], directory: Path, world: World) -> int:
    """Write what this rank holds of tensors, and wait until it is on disk; a collective.

    What all ranks hold is written by one of them. Raises what has failed here: where it is something on another rank,
    that one does.

    Returns:
        How many files a rank has at most.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with lost_ranks_named(world, "the writing of all ranks' parts of a checkpoint"):
        places = _places(tensors, world)
        held = {name: _storable(x) for name, x in tensors.items()}
        writer = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=places, save_distributed=True)
        failed = _failure(lambda: save(held, storage_writer=writer), world.rank)
    if failed is not None:
        raise failed
    return max(places.values())


def outline(source: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors that files hold the parts of, without their numbers (on torch's meta device).

    Raises:
        ValueError: one of the files is none of ours, or rows are missing or there twice.
    """
    pieces: dict[str, list[_Piece]] = defaultdict(list)
    for name in names:
        for key, piece in _pieces(source / name):
            pieces[key].append(piece)
    return {key: _put_together(source, key, found) for key, found in pieces.items()}


def read(
    source: Path,
    names: Sequence[str],
    check: Callable[[set[str]], None],
    outlines: Mapping[str, Tensor],
    likes: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Tensors in memory of their own: those rows that this rank holds of another one of the name, or all.

    Args:
        source: the checkpoint.
        names: its files of parts. Others that lie there are not looked into.
        check: is given those of them that this rank needs, before they are read, to refuse them.
        outlines: as :func:`outline` gives them.
        likes: what may be in parts.

    Raises:
        ValueError: torch cannot read them.
    """
    if not torch.distributed.is_available():
        raise ValueError(
            f"{source} is in parts, which torch {torch.__version__} can't read, since it was built without "
            "torch.distributed; install another build"
        )
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(HuggingFaceStorageReader):
        def read_data(self, plan: Any, planner: Any) -> Any:
            check({Path(self.storage_data[item.storage_index].relative_path).name for item in plan.items})
            return super().read_data(plan, planner)

    reader: Any = Reader(str(source))
    reader.fs.ls = lambda _: [str(source / name) for name in names]  # torch would read whatever lies there
    found = {name: _room(x, likes.get(name)) for name, x in outlines.items()}
    failed = _failure(lambda: load(found, storage_reader=reader, no_dist=True), 0)  # a rank that fails can say so
    if isinstance(failed, AssertionError | LookupError | TypeError | ValueError | SafetensorError):
        raise failed if isinstance(failed, files.Damaged) else damaged(source, repr(failed)) from failed
    if failed is not None:  # no memory, or no disk
        raise failed
    return found


def _places(tensors: Mapping[str, Tensor], world: World) -> dict[str, int]:
    """Which of a rank's files a tensor goes to, the same on all ranks, from 1.

    What one rank writes for all, counts of steps above all, has files of its own: nobody need read others' rows for it.
    """
    number, filled, before, found = 1, 0, False, {}
    for name, x in sorted(tensors.items(), key=lambda item: is_shard(item[1])):
        size = x.numel() * x.element_size() // (world.size if is_shard(x) else 1)
        if found and (is_shard(x) is not before or filled + size > _LARGEST):
            number, filled = number + 1, 0
        filled, before = filled + size, is_shard(x)
        found[name] = number
    return found


def _storable(x: Tensor) -> Tensor:
    """Rows of a tensor, or all of it in memory of its own, of which alone safetensors writes."""
    if in_rows(x):
        return x.detach()
    return whole(x).detach().contiguous().clone()


def _room(x: Tensor, like: Tensor | None) -> Tensor:
    if is_shard(like) and like is not None and like.shape == x.shape:
        return torch.empty_like(like.detach(), dtype=x.dtype)
    return torch.empty(x.shape, dtype=x.dtype)


def _failure(call: Callable[[], Any], rank: int) -> BaseException | None:
    """What has failed on this rank in one of torch's calls, which ends alike on all of them."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with _quiet():
            call()
    except CheckpointException as error:
        failed, _ = error.failures.get(rank, (None, None))
        return failed
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what torch says: that there is no process group, that parts are not put together, and so on."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@attrs.frozen
class _Piece:
    """Rows of a tensor."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def _pieces(path: Path) -> Iterator[tuple[str, _Piece]]:
    """What a file's header says that it holds."""
    files.opened(path).close()  # a plain file
    try:
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for key in file.keys():  # noqa: SIM118  no mapping
                part = file.get_slice(key)
                shape = tuple(part.get_shape())
                dtype = (part[:0] if shape else file.get_tensor(key)).dtype
                at = places[key]["saved_offsets"]
                if not all(type(place) is int for place in at):
                    raise TypeError(f"{key} begins at {at!r:.60}")
                yield key, _Piece(tuple(at), shape, dtype)
    except (SafetensorError, OSError, MemoryError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise damaged(path.parent, f"{path.name}: {error}") from error


def _put_together(source: Path, name: str, pieces: list[_Piece]) -> Tensor:
    """The outline of a tensor whose pieces follow each other along the first axis, without a hole or a row twice."""
    first, rows = pieces[0], 0
    for piece in sorted(pieces, key=lambda piece: (piece.offsets, piece.shape)):
        begins = (rows, *(0 for _ in first.shape))[: len(first.shape)]
        alike = (piece.dtype, piece.shape[1:]) == (first.dtype, first.shape[1:])
        if piece.offsets != begins or len(piece.shape) != len(first.shape) or not alike:
            raise damaged(source, f"the parts of {name} do not follow each other, from its first row to its last")
        rows += sum(piece.shape[:1])
    if len({piece.offsets for piece in pieces}) != len(pieces):
        raise damaged(source, f"a part of {name} is there twice")
    return torch.empty((rows, *first.shape[1:])[: len(first.shape)], dtype=first.dtype, device="meta")
