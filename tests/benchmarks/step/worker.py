"""One side, one workload, one process: ``python -m tests.benchmarks.step.worker --side ours --model DIR --work W1``.

The last line of what it prints is JSON. A step is measured after a first one, which has made the optimiser's moments
and whatever else is made once; generation after a few tokens. The peak is that of the process until the end of the
measured call, models included. `--same` makes one step in a given order instead, and saves the weights before and
after.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .workload import WORKS, Work, make_batch, sampling, set_start

STATISTICS = ("ppo/loss/policy", "ppo/loss/value", "ppo/policy/approxkl", "ppo/policy/clipfrac", "objective/kl")
OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-5),
}
"""For `--same`. A step of SGD is linear in the gradient, and so is its rounding; one of Adam is not where a gradient is
about as small as its rounding."""
ORDER_SEED = 7


def product_rates(size: int = 2048, times: int = 5) -> dict[str, float]:
    """GFLOP/s of a float32 product of two square matrices, by torch.mm and by oneDNN where torch has an operator."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    ways: dict[str, Callable[[], Any]] = {"mm": lambda: torch.mm(a, b)}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ways["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    rates: dict[str, float] = {}
    for name, way in ways.items():
        way()
        start = time.perf_counter()
        for _ in range(times):
            way()
        rates[name] = times * 2 * size**3 / (time.perf_counter() - start) / 1e9
    return rates


def peak_mib() -> float:
    """Peak resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # where there is none, the number begins with the parent's on some systems
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def calls_of(trainer: Any, work: Work, batch: Any) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    """What warms up, and what is measured, by name."""
    queries, pad = batch[0], trainer.tokenizer.pad_token_id
    if not work.new_tokens:
        return lambda: trainer.step(*batch), {"step": lambda: trainer.step(*batch)}

    def generate(work: Work, **options: Any) -> None:
        responses = trainer.generate(queries, **sampling(work, pad), **options)
        lengths = {len(response) for response in responses}
        if len(responses) != work.batch or lengths != {work.new_tokens}:
            raise RuntimeError(f"{len(responses)} responses of lengths {lengths}: another work than was asked for")

    return lambda: generate(work._replace(new_tokens=4)), {
        "generate": lambda: generate(work),
        f"generate, batch {work.batch}": lambda: generate(work, batch_size=work.batch),
    }


def measure(side: ModuleType, name: str, directory: str, *, accel: str, profile: bool) -> dict[str, Any]:
    """Seconds, peak memory and the rate of a product beside them."""
    work = WORKS[name]
    trainer = side.make_trainer(directory, work, accel=accel)
    batch = make_batch(work, trainer.model.pretrained_model.config.vocab_size)
    warm_up, calls = calls_of(trainer, work, batch)
    found: dict[str, Any] = {"backend": side.backend(trainer), "seconds": {}, "peak_mib": {}, "statistics": {}}
    found["tokens"], found["response_tokens"] = sum(map(len, batch[0] + batch[1])), sum(map(len, batch[1]))
    rates = [product_rates()]
    warm_up()
    for call, run in calls.items():
        start = time.perf_counter()
        stats = run()
        found["seconds"][call] = time.perf_counter() - start
        found["peak_mib"][call] = peak_mib()
        if stats is not None:
            found["statistics"] = chosen(stats)
    rates.append(product_rates())
    found["product_gflops"] = {name: [each[name] for each in rates] for name in rates[0]}
    if hasattr(side, "needed_flops"):
        found["needed_flops"] = side.needed_flops(trainer, work, batch)
    if profile and not work.new_tokens:
        found["parts"] = side.parts_of_a_step(trainer, batch)
    return found


def chosen(stats: dict[str, Any]) -> dict[str, float]:
    """Statistics that both sides have."""
    return {name: float(stats[name]) for name in STATISTICS}


def step_and_save(side: ModuleType, name: str, directory: str, optimiser: str, file: Path) -> dict[str, Any]:
    """One step in a given order, from a given start; the weights before and after go to a file."""
    work = WORKS[name]
    trainer = side.make_trainer(directory, work, accel="eager", optimizer=OPTIMISERS[optimiser])
    model = trainer.model
    set_start(model)
    batch = make_batch(work, model.pretrained_model.config.vocab_size)

    def weights() -> dict[str, torch.Tensor]:
        inner = {name: p.detach().clone() for name, p in model.pretrained_model.named_parameters()}
        return inner | {f"value head {name}": p.detach().clone() for name, p in model.v_head.summary.named_parameters()}

    before = weights()
    stats = side.step_in_order(trainer, work, batch, ORDER_SEED)
    torch.save({"before": before, "after": weights()}, file)
    return {"statistics": chosen(stats)}


def main() -> None:
    """Do as told and print the JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.step.worker", description="Measure one side once."
    )
    parser.add_argument("--side", choices=("ours", "peer"), required=True, help="whose trainer")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--work", choices=WORKS, required=True, help="the workload")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--accel", default="auto", help="PPOConfig's accel (ours)")
    parser.add_argument("--profile", action="store_true", help="one step more, by part (ours)")
    parser.add_argument("--same", choices=OPTIMISERS, help="make one step in a given order with this optimiser")
    parser.add_argument("--weights", type=Path, help="where --same saves the weights")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    side = import_module(f".{options.side}", __package__)
    if options.same:
        found = step_and_save(side, options.work, options.model, options.same, options.weights)
    else:
        found = measure(side, options.work, options.model, accel=options.accel, profile=options.profile)
    found["versions"] = {name: metadata.version(name) for name in ("torch", "transformers")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
