"""Twenty steps on one, two and four ranks, in both ways of sharing a model: the same weights and statistics.

``python -m tests.runtime.ranks.equality`` prints how far they are from those of one process, and fails where that is
more than rounding. Run with a folder, this file is one of several processes; the folder's name says what it does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ppo_runtime.learning.update import Progress, Targets, optimise
from ppo_runtime.ranks.shards import whole
from tests.runtime.support.processes import run_ranks
from tests.runtime.support.tiny import tiny_lora
from tests.runtime.support.trainers import make_batch, make_trainer, untimed

ROWS, STEPS = 8, 20
ALLOWED, ALLOWED_IN_DOUBLE = 1e-5, 1e-12
KINDS: dict[str, dict[str, Any]] = {
    "causal": {"family": "llama"},
    # Its keys have a bias whose gradient is rounding alone, of which Adam makes whole steps unless they are damped.
    "tied": {"family": "gpt2", "optimizer_of": lambda model: torch.optim.Adam(model.parameters(), lr=1e-4, eps=1e-5)},
    "t5": {"family": "t5"},
    "lora": {"family": "llama", "peft_config": True},
}
WORLDS = (("ddp", 2), ("ddp", 4), ("fsdp2", 2))
SETTINGS: dict[str, Any] = {
    "ppo_epochs": 2,
    "learning_rate": 1e-4,
    "max_grad_norm": 1.0,
    "whiten_rewards": True,
    "use_score_scaling": True,
    "use_score_norm": True,
}


def run(kind: str, steps: int, *, rank: int = 0, ranks: int = 1, **settings: Any) -> dict[str, Any]:
    """Statistics and weights of a rank's share of every batch, each of whose updates is on half of it."""
    rows = ROWS // ranks
    trainer = make_trainer(
        **made_of(kind), batch_size=rows, mini_batch_size=1, gradient_accumulation_steps=rows, **(SETTINGS | settings)
    )
    mine = slice(rank * rows, (rank + 1) * rows)
    history = [untimed(trainer.step(*(part[mine] for part in make_batch(ROWS, seed=seed)))) for seed in range(steps)]
    return {"stats": history, "weights": whole_weights(trainer)}


def exact(kind: str, steps: int, *, rank: int = 0, ranks: int = 1, **settings: Any) -> dict[str, Any]:
    """Weights in double precision after updates towards given targets, since what gives those is in single."""
    rows = ROWS // ranks
    trainer = make_trainer(
        **made_of(kind),
        placed=lambda model: model.double(),
        batch_size=rows,
        mini_batch_size=1,
        gradient_accumulation_steps=rows,
        **(SETTINGS | settings),
    )
    mine = slice(rank * rows, (rank + 1) * rows)
    for seed in range(steps):
        queries, responses, _ = make_batch(ROWS, seed=seed)
        everything = trainer._lay_out(queries, responses, None)
        generator = torch.Generator().manual_seed(seed)
        shape = everything.mask.shape
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in Targets._fields]
        optimise(
            trainer.model,
            trainer.optimizer,
            everything.select(torch.arange(ROWS)[mine]),
            Targets(*(x[mine] for x in drawn))._replace(old_logprobs=drawn[0][mine] - 4),
            [[[row] for row in [torch.arange(rows)]]],
            everything.mask.sum().float()[None],
            trainer.config,
            policy_loss=trainer.policy_objective,
            parallel=trainer.parallel,
            progress=Progress([]),
        )
    return {"stats": [], "weights": whole_weights(trainer)}


def made_of(kind: str) -> dict[str, Any]:
    """Arguments of a trainer."""
    given = dict(KINDS[kind])
    if given.pop("peft_config", None):
        given["peft_config"] = tiny_lora(given["family"])
    return given


def whole_weights(trainer: Any) -> dict[str, Any]:
    """What trains, of all ranks."""
    return {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def far(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    """The largest difference of a weight, and of a statistic, relative to 1 or to what it is."""
    weights = max(float((x - expected["weights"][name]).abs().max()) for name, x in found["weights"].items())
    differences = (
        float(np.max(np.abs(np.asarray(mine) - theirs) / np.maximum(1.0, np.abs(theirs)), initial=0.0))
        for step, other in zip(found["stats"], expected["stats"], strict=True)
        for mine, theirs in ((step[name], np.asarray(other[name])) for name in other)
    )
    return weights, max(differences, default=0.0)


def same_bits(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two ranks have the same weights and statistics, to the last bit."""
    return all(torch.equal(x, second["weights"][name]) for name, x in first["weights"].items()) and all(
        np.array_equal(mine[name], theirs[name])
        for mine, theirs in zip(first["stats"], second["stats"], strict=True)
        for name in mine
    )


def be_one_rank(folder: Path) -> None:
    """Do what the folder's name says."""
    kind, parallelism, steps, dtype = folder.name.split("-")
    torch.set_num_threads(1)
    from ppo_runtime.ranks.world import world_from_environment

    world = world_from_environment()
    found = (exact if dtype == "double" else run)(
        kind, int(steps), rank=world.rank, ranks=world.size, parallelism=parallelism
    )
    torch.save(found, folder / f"{world.rank}.pt")
    dist.destroy_process_group()


def compared(
    kind: str, parallelism: str, ranks: int, steps: int, expected: dict[str, Any], dtype: str = "single"
) -> tuple[float, float, bool]:
    """How far weights and statistics are from those of one process, and whether all ranks have the same."""
    with TemporaryDirectory() as place:
        folder = Path(place) / f"{kind}-{parallelism}-{steps}-{dtype}"
        folder.mkdir()
        found = run_ranks(__file__, folder, ranks=ranks, warnings="default")
    return *far(found[0], expected), all(same_bits(found[0], one) for one in found[1:])


def main() -> int:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{'model':8} {'engine':6} {'ranks':>5} {'float32':>8} {'statistics':>10} {'float64':>8}  all ranks alike")
    good = True
    for kind in KINDS:
        single, double = run(kind, STEPS), exact(kind, STEPS)
        for parallelism, ranks in WORLDS:
            weights, stats, alike = compared(kind, parallelism, ranks, STEPS, single)
            wide, _, alike_too = compared(kind, parallelism, ranks, STEPS, double, "double")
            print(
                f"{kind:8} {parallelism:6} {ranks:5} {weights:8.1e} {stats:10.1e} {wide:8.1e}  {alike and alike_too}",
                flush=True,
            )
            good &= alike and alike_too and max(weights, stats) <= ALLOWED and wide <= ALLOWED_IN_DOUBLE
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.runtime.ranks.equality", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of one of several processes")
    if (given := parser.parse_args().folder) is not None:
        be_one_rank(given)
    else:
        raise SystemExit(main())
