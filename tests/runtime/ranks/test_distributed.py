"""Two real gloo processes against one: the same bits on both ranks, and what one process makes of the union.

Run as a script, this file is one of the two processes.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppo_core.averages import Average, average, mean_of
from ppo_core.moments import Moments, masked_moments, variance
from ppo_runtime.ranks.agreement import agree_any
from ppo_runtime.ranks.gather import (
    CAPACITY,
    Maximum,
    broadcast_parameters,
    gather_averages,
    gather_rows,
    merge_moments,
    sum_gradients,
)
from ppo_runtime.ranks.world import World, world_from_environment
from tests.runtime.support.processes import run_ranks

ALONE = World(rank=0, size=1)
CUT = 4  # rank 0 has the first four of eleven rows, rank 1 the rest


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 1e4 + torch.randn(11, 5, generator=generator, dtype=torch.float64)
    return x, torch.rand(11, 5, generator=generator) < 0.7


def share(world: World, *tensors: Tensor) -> tuple[Tensor, ...]:
    rows = slice(None) if world.size == 1 else (slice(0, CUT), slice(CUT, None))[world.rank]
    return tuple(tensor[rows] for tensor in tensors)


def flat_metrics(metrics: dict[str, Average | Maximum]) -> list[Tensor]:
    return [field for metric in metrics.values() for field in metric]


def averages_case(world: World) -> list[Tensor]:
    x, mask = share(world, *data())
    metrics = {
        "length": average(mask.sum(1).double(), torch.ones(len(mask), dtype=torch.bool)),
        "reward": average(x, mask),
        "nothing": average(x, torch.zeros_like(mask)),
        "largest": Maximum(x.max()),
        "spread": masked_moments(x, mask),
    }
    return flat_metrics(gather_averages(metrics, world))


def masked_mean_case(world: World) -> list[Tensor]:
    return [mean_of(gather_averages({"x": average(*share(world, *data()))}, world)["x"])]


def moments_case(world: World) -> list[Tensor]:
    return list(merge_moments(masked_moments(*share(world, *data())), world))


def empty_rank_case(world: World) -> list[Tensor]:
    x, mask = data()
    mask[CUT:] = False
    x, mask = share(world, x, mask)
    averaged = gather_averages({"x": average(x, mask)}, world)
    return [*averaged["x"], *merge_moments(masked_moments(x, mask), world)]


def columns_case(world: World) -> list[Tensor]:
    return list(merge_moments(masked_moments(*share(world, *data()), dim=0), world))


def rows_case(world: World, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    (x,) = share(world, torch.arange(-5, 6).to(dtype))
    return [gather_rows(x, world)]


def rows_of_one_rank_case(world: World) -> list[Tensor]:
    x = torch.arange(3.0)
    return [gather_rows(x if world.rank == 0 else x[:0], world), gather_rows(x[:0], world)]


def any_case(world: World) -> list[Tensor]:
    return [torch.tensor([agree_any(world.rank == world.size - 1, world), agree_any(False, world)])]


def gradients_case(world: World) -> list[Tensor]:
    """Loss over a global weight: the sum over ranks is the gradient of one process over all rows."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(5, 1, dtype=torch.float64) for name in ("all", "last", "none", "frozen")})
    model["frozen"].requires_grad_(False)
    (x,) = share(world, (data()[0] - 1e4))
    loss = model["all"](x).square().sum() / 11
    if world.rank == world.size - 1:
        loss = loss + model["last"](data()[0][-1] - 1e4).sum()
    loss.backward()
    sum_gradients(model.parameters(), world)
    assert all(parameter.grad is None for name in ("none", "frozen") for parameter in model[name].parameters())
    return [parameter.grad for name in ("all", "last") for parameter in model[name].parameters()]


def broadcast_case(world: World) -> list[Tensor]:
    torch.manual_seed(world.rank)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).bfloat16())
    model[0].weight.data = model[0].weight.data.T.contiguous().T
    model[1].num_batches_tracked += world.rank
    broadcast_parameters(model, world)
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]


CASES: dict[str, Callable[[World], list[Tensor]]] = {
    "averages": averages_case,
    "masked mean": masked_mean_case,
    "moments": moments_case,
    "moments of columns": columns_case,
    "all masked on one rank": empty_rank_case,
    "ragged rows": rows_case,
    "ragged boolean rows": partial(rows_case, dtype=torch.bool),
    "ragged bfloat16 rows": partial(rows_case, dtype=torch.bfloat16),
    "rows on one rank": rows_of_one_rank_case,
    "any": any_case,
    "gradients": gradients_case,
    "broadcast": broadcast_case,
}


def error_of(function: Callable[..., object], *arguments: object) -> str:
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return "no error"


def be_one_rank(folder: Path) -> None:
    world = world_from_environment()
    assert world == world_from_environment()
    results: dict[str, object] = {name: case(world) for name, case in CASES.items()}
    one = Average(torch.tensor(1.0), torch.tensor(1.0))
    ours = {"shared": one, f"only {world.rank}": one}
    results["differing keys"] = error_of(gather_averages, ours, world)
    results["more keys on one rank"] = error_of(gather_averages, {"a": one} if world.rank else {}, world)
    results["differing kinds"] = error_of(
        gather_averages, {"a": one if world.rank else Maximum(torch.tensor(1.0))}, world
    )
    results["no scalar on one rank"] = error_of(
        gather_averages, {"a": Maximum(torch.zeros(1 + world.rank).squeeze())}, world
    )
    results["differing dtypes"] = error_of(
        gather_rows, torch.ones(2, dtype=torch.float64 if world.rank else torch.int64), world
    )
    # After an error everyone is still in step.
    results["afterwards"] = flat_metrics(gather_averages({"a": one}, world))
    torch.save(results, folder / f"{world.rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What both ranks make of every case."""
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_hold_the_same_bits(ranks: list[dict], case: str) -> None:
    first, second = (rank[case] for rank in ranks)
    assert [tensor.dtype for tensor in first] == [tensor.dtype for tensor in second]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_agree_with_one_on_the_union(ranks: list[dict], case: str) -> None:
    torch.testing.assert_close(ranks[0][case], CASES[case](ALONE), rtol=1e-12, atol=1e-12)


def test_merged_moments_are_those_of_the_union(ranks: list[dict]) -> None:
    x, mask = data()
    kept = x[mask]
    merged = Moments(*ranks[0]["moments"])
    torch.testing.assert_close(merged.mean, kept.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(variance(merged, correction=1), kept.var(), rtol=1e-12, atol=0)


def test_a_masked_mean_is_over_kept_values_of_all_ranks(ranks: list[dict]) -> None:
    # TRL summed masked values too (defect 3) and averaged the ranks' averages (defects 4 and 5).
    x, mask = data()
    torch.testing.assert_close(ranks[0]["masked mean"][0], x[mask].mean(), rtol=1e-12, atol=0)


def test_differing_keys_are_named_on_every_rank(ranks: list[dict]) -> None:
    message = ranks[0]["differing keys"]
    assert message == ranks[1]["differing keys"]
    assert message.startswith(
        "the kind of metric only 0 is 'Average' on rank 0 and absent on rank 1; "
        "the kind of metric only 1 is absent on rank 0 and 'Average' on rank 1; give the neutral element"
    )
    assert "shared" not in message
    assert "metric a is absent on rank 0 and 'Average' on rank 1" in ranks[0]["more keys on one rank"]
    assert "metric a is 'Maximum' on rank 0 and 'Average' on rank 1" in ranks[0]["differing kinds"]


def test_what_one_rank_cannot_gather_all_refuse(ranks: list[dict]) -> None:
    for rank in ranks:
        assert (
            rank["no scalar on one rank"] == "rank 1: metrics['a'] has shape (2,), expected a scalar; reduce it first"
        )


def test_differing_dtypes_are_refused_on_every_rank(ranks: list[dict]) -> None:
    for rank in ranks:
        said = "distribution x is 'torch.int64' on rank 0 and 'torch.float64' on rank 1"
        assert said in rank["differing dtypes"]


def test_ranks_stay_in_step_after_an_error(ranks: list[dict]) -> None:
    assert [field.item() for field in ranks[0]["afterwards"]] == [2.0, 2.0]


def test_a_world_of_one_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_from_environment() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert world_from_environment() == ALONE
    assert not dist.is_initialized()


def test_a_world_of_one_keeps_missing_gradients() -> None:
    model = nn.Linear(2, 2)
    sum_gradients(model.parameters(), ALONE)
    assert model.weight.grad is None


def test_missing_torchrun_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT is not set"):
        world_from_environment()


def test_a_rank_that_nobody_joins_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"rank 1 could not meet the others of WORLD_SIZE = 2 ranks: .*127\.0\.0\.1"):
        world_from_environment(timeout=1)


def test_a_group_without_cpu_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(RuntimeError, match=r"backend cuda:nccl, expected .* CPU tensors; initialise it with 'gloo'"):
        world_from_environment()


def test_metrics_must_be_few_scalars() -> None:
    with pytest.raises(ValueError, match=r"metrics\['a'\] has shape \(2,\), expected a scalar"):
        gather_averages({"a": Maximum(torch.zeros(2))}, ALONE)
    one = Maximum(torch.tensor(1.0))
    with pytest.raises(ValueError, match=f"metrics has {CAPACITY + 1} entries, expected at most {CAPACITY}"):
        gather_averages({str(i): one for i in range(CAPACITY + 1)}, ALONE)


def test_gathered_averages_carry_no_graph() -> None:
    total = torch.ones((), requires_grad=True)
    (gathered,) = gather_averages({"a": Average(total, torch.ones(()))}, ALONE).values()
    assert not gathered.total.requires_grad
    assert gathered.total.dtype == torch.float64


def test_rows_must_have_one_axis() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), expected one axis"):
        gather_rows(torch.zeros(2, 3), ALONE)


if __name__ == "__main__":
    be_one_rank(Path(sys.argv[1]))
