"""A rank that dies, leaves or hangs: the others end with an error that says which one, and where they waited for it.

The whole table is printed by ``python -m tests.runtime.ranks.matrix``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ppo_runtime.ranks import presence
from ppo_runtime.ranks.presence import RankLost, agreed, lost_ranks_named
from ppo_runtime.ranks.world import World
from tests.runtime.ranks import matrix
from tests.runtime.support.divided import divided
from tests.runtime.support.processes import ROOT, ends_of_ranks

ALONE = World(rank=0, size=1)
CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
LATE = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation to complete")


def assert_ended(folder: Path) -> None:
    """No thread of gloo outlives a script: one that gives back a tensor when Python has ended aborts the process."""
    assert not [path for path in folder.glob("*.threads") if "gloo" in path.read_text()]


def left_alone(case: str, culprit: int, folder: Path) -> str:
    """What the other rank says, which ends by itself and not well."""
    ends, cases = matrix.run([case], culprit, "ddp", folder)
    ended, found = ends[1 - culprit], cases[case][1 - culprit]
    assert ended.code == 1, ended
    assert found is not None
    assert found.kind == "RankLost", ended.complaint
    assert_ended(folder)
    return found.message


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_is_killed_is_named(culprit: int, tmp_path: Path) -> None:
    said = left_alone("killed", culprit, tmp_path)
    assert f"rank {culprit} was lost: the process has ended. The others waited in " in said


def test_a_rank_whose_script_ends_by_an_error_is_named_with_it(tmp_path: Path) -> None:
    said = left_alone("raises_between_steps", 1, tmp_path)
    assert "rank 1 has left: LookupError: a line of the script. The others waited in " in said
    assert "step 2" in said


@divided
def test_a_rank_that_fails_in_a_pass_of_a_divided_model_is_named_with_its_error(tmp_path: Path) -> None:
    """It makes no vote, since the others wait for a layer's weights."""
    ends, cases = matrix.run(["raises_in_a_pass"], 1, "fsdp2", tmp_path)
    found, its = cases["raises_in_a_pass"]
    assert [ended.code for ended in ends] == [1, 1], ends
    assert found is not None
    assert its is not None
    assert (its.kind, its.message) == ("MemoryError", "no room for the layer")
    assert found.kind == "RankLost"
    assert "rank 1 has left: MemoryError: no room for the layer. The others waited in a pass" in found.message
    assert_ended(tmp_path)


def test_a_rank_whose_script_ends_before_the_others_is_named(tmp_path: Path) -> None:
    assert "rank 0 has left: its script has ended. The others waited in " in left_alone("ends_earlier", 0, tmp_path)


def test_a_rank_that_does_not_come_is_named_when_the_time_is_over(tmp_path: Path) -> None:
    (_, late), cases = matrix.run(["hangs"], 1, "ddp", tmp_path)
    found, its = cases["hangs"]
    assert found is not None
    assert its is not None
    assert found.kind == its.kind == "RankLost"
    assert its.message == f"the others have gone on without this rank: {found.message}"
    assert "rank 1 was lost: too late; where it is no more than slow, set ranks_timeout" in found.message
    assert late.code == 1


def test_torchrun_ends_with_an_error_and_names_the_rank(tmp_path: Path) -> None:
    """As long as its agent, which ends all ranks when one has ended, leaves them the time to say so, as train does."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from ppo_runtime.ranks.agreement import agree_any\n"
        "from ppo_runtime.ranks.world import world_from_environment\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "world = world_from_environment()\n"
        "agree_any(True, world, 'the first meeting')\n"
        "if world.rank == 1:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "agree_any(True, world, 'the second meeting')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "rank 1 was lost: the process has ended. The others waited in the second meeting" in done.stderr
    assert "destroy_process_group" not in done.stderr, "torch has nothing to complain of"


def test_a_script_that_ends_by_an_error_that_is_its_own_cause_ends(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from ppo_runtime.ranks.world import world_from_environment\n"
        "world_from_environment()\n"
        "try:\n"
        "    raise LookupError('a line of the script')\n"
        "except LookupError as error:\n"
        "    raise error from error\n"
    )
    ends = ends_of_ranks([sys.executable, str(script)], limit=60)
    assert [ended.code for ended in ends] == [1, 1], ends


class Meeting:
    """Ranks of one process, which note where they are in one store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int = 3) -> None:
        self.store = dist.HashStore()
        self.ranks = [presence._Presence(World(rank, size), self.store) for rank in range(size)]
        monkeypatch.setattr(presence, "_PATIENCE", 0.0)
        monkeypatch.setattr(presence, "_presence", lambda world: self.ranks[world.rank])

    def come(self, rank: int, phase: str, error: BaseException | None = None) -> None:
        """One rank comes to a phase, and leaves it by an error if it is given one."""
        with lost_ranks_named(self.ranks[rank].world, phase):
            if error is not None:
                raise error

    def said(self, rank: int, phase: str, error: BaseException) -> str:
        with pytest.raises(RankLost) as caught:
            self.come(rank, phase, error)
        return str(caught.value)


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    """Three ranks that have been in one phase."""
    found = Meeting(monkeypatch)
    for rank in range(3):
        found.come(rank, "the first phase")
    return found


def test_the_rank_that_is_behind_is_the_one_that_is_lost(meeting: Meeting) -> None:
    said = meeting.said(0, "the second phase", CLOSED)
    assert "ranks 1 and 2 were lost" in said
    assert "The others waited in the second phase" in said
    assert "last in the first phase" in said


def test_the_first_to_know_speaks_for_all(meeting: Meeting) -> None:
    meeting.ranks[1].come_to("the second phase")
    first = meeting.said(0, "the second phase", LATE)
    assert "rank 2 was lost: too late" in first
    assert meeting.said(1, "the second phase", CLOSED) == first
    told_of_itself = f"the others have gone on without this rank: {first}"
    assert meeting.said(2, "the second phase", CLOSED) == told_of_itself


def test_a_rank_that_has_left_can_not_come_back(meeting: Meeting) -> None:
    with pytest.raises(ValueError, match=r"^x$"):
        meeting.come(1, "the second phase", ValueError("x"))
    assert "rank 1 has left: ValueError: x" in meeting.said(0, "the second phase", CLOSED)
    with pytest.raises(RankLost, match=r"this rank has left the second phase, .*ValueError: x"):
        meeting.come(1, "the third phase")


def test_an_error_of_all_ranks_parts_nobody(meeting: Meeting) -> None:
    with pytest.raises(ValueError, match=r"^x$"):
        meeting.come(1, "the second phase", agreed(ValueError("x")))
    meeting.come(1, "the third phase")


@pytest.mark.parametrize("text", ["the critic's server: request timed out", "NCCL, gloo: connection reset by peer"])
def test_an_error_that_speaks_of_connections_is_of_no_collective(meeting: Meeting, text: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{text}$"):
        meeting.come(1, "the second phase", agreed(RuntimeError(text)))
    with pytest.raises(RuntimeError, match=f"^{text}$"):
        meeting.come(1, "the third phase", RuntimeError(text))
    assert f"rank 1 has left: RuntimeError: {text}" in meeting.said(0, "the third phase", CLOSED)


@pytest.mark.parametrize(
    "error", [CLOSED, LATE, dist.DistBackendError("NCCL error in: x"), dist.DistStoreError("wait timeout after 5ms")]
)
def test_errors_of_collectives_are_of_another_rank(meeting: Meeting, error: RuntimeError) -> None:
    assert "ranks 1 and 2 were lost" in meeting.said(0, "the second phase", error)


def test_phases_are_said_with_what_they_are_part_of(meeting: Meeting) -> None:
    with pytest.raises(RankLost, match="in the updates of step 3;"), lost_ranks_named(World(0, 3), "step 3"):
        meeting.come(0, "the updates", CLOSED)
    assert meeting.ranks[0].phases == []


def test_without_the_store_it_is_the_rank_that_kept_it(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    for rank in meeting.ranks:
        rank.store = type("Gone", (), {"set": gone, "get": gone, "check": gone})()
    assert "rank 0 was lost, which kept the ranks' store" in meeting.said(1, "the second phase", CLOSED)


def test_alone_nothing_is_noted_or_changed() -> None:
    with pytest.raises(RuntimeError) as caught, lost_ranks_named(ALONE, "a phase"):
        raise CLOSED
    assert caught.value is CLOSED


def test_a_process_that_is_there_is_not_gone() -> None:
    machine = presence._machine()
    assert not presence._is_gone(f"{machine} {os.getpid()}")
    assert not presence._is_gone("elsewhere 1")
    assert not presence._is_gone(None)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    while ended.returncode is None and not presence._is_gone(f"{machine} {ended.pid}"):
        pass  # nobody has waited for it: it is there still, as a process that has ended
    ended.wait()
    assert presence._is_gone(f"{machine} {ended.pid}")
