"""How fast the core is: ``python -m tests.benchmarks.core [--threads 1,2] [--only gae,head,rows] [--compile] [--cpu]``.

Every row compares two sides that take turns in one process, each by the median of its turns: what the machine does
besides hits both. A turn repeats a short call for about 10 ms, as timeit does. On a machine that is not quiet,
``--cpu`` measures the processor time of one thread instead of the time of day. Memory is the peak resident size of a
process of its own, above what its inputs take. float32; tokens, masks and logits are random, the mask without pattern.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ppo_core import compute_rewards, fused_logprobs, gae, masked_moments, whiten
from tests.benchmarks.step.worker import peak_mib

GAMMA, LAM = 1.0, 0.95
HEAD = (1024, 576, 49152)
"""Rows, width, vocabulary."""
CHUNK = 2048
TURN = 0.01
"""Seconds that a run of a short call lasts."""
clock: Callable[[], float] = time.perf_counter
Row = tuple[str, float, str, float, str]


def medians(*sides: Callable[[], object], seconds: float = 3.0, most: int = 200) -> list[float]:
    """Milliseconds per call of each side: the median of runs that take turns."""
    calls: list[int] = []
    for side in sides:
        side()
        start = time.perf_counter()
        side()
        calls.append(max(1, round(TURN / (time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in sides]
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < most):
        for side, taken, repeated in zip(sides, times, calls, strict=True):
            start = clock()
            for _ in range(repeated):
                side()
            taken.append((clock() - start) / repeated)
    return [1e3 * statistics.median(taken) for taken in times]


# Advantages.


def gae_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The customary backward loop over time."""
    rewards, values = rewards * mask, values * mask
    found: list[Tensor] = []
    last: Tensor | float = 0.0
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        last = delta + GAMMA * LAM * last
        found.append(last)
    advantages = torch.stack(found[::-1]).transpose(0, 1)
    return advantages, advantages + values


def bench_gae(compiled: bool) -> list[Row]:
    """gae against the loop (with its aim), and against copying what it reads and writes."""
    rows: list[Row] = []
    function = torch.compile(gae, fullgraph=True) if compiled else gae
    kind = "compiled" if compiled else "eager"
    for (batch, steps), aim in {(64, 1024): 15, (256, 256): 8, (8, 4096): 60}.items():
        rewards, values, mask = torch.randn(batch, steps), torch.randn(batch, steps), torch.rand(batch, steps) < 0.7
        out = [torch.empty_like(x) for x in (rewards, values, mask)]

        def ours(rewards: Tensor = rewards, values: Tensor = values, mask: Tensor = mask) -> object:
            return function(rewards, values, mask, gamma=GAMMA, lam=LAM)

        def loop(rewards: Tensor = rewards, values: Tensor = values, mask: Tensor = mask) -> object:
            return gae_loop(rewards, values, mask)

        def copy(inputs: tuple[Tensor, ...] = (rewards, values, mask), out: list[Tensor] = out) -> object:
            return [target.copy_(x) for target, x in zip(out, inputs, strict=True)]

        fast, slow = medians(ours, loop)
        rows.append((f"gae {kind} [{batch}, {steps}]", fast, "loop over time", slow, f"{aim}x wanted"))
        fast, least = medians(ours, copy, seconds=1.0)
        rows.append((f"gae {kind} [{batch}, {steps}]", fast, "copy", least, f"1/{4 if compiled else 25}x aimed at"))
    return rows


# The head.


def head_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and tokens."""
    n, width, vocab = HEAD
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, width).requires_grad_(), torch.randn(vocab, width).mul_(0.05).requires_grad_()
    return hidden, weight, torch.randint(vocab, (n,))


def head_fused(hidden: Tensor, weight: Tensor, tokens: Tensor, keep_logits: bool = False) -> None:
    """Forward and backward through the fused head."""
    spec = {"temperature": 1.0, "scale": 1.0, "softcap": None, "chunk_size": CHUNK}
    out = fused_logprobs(hidden, weight, tokens, **spec, keep_logits=keep_logits, product=torch.mm)
    torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), (hidden, weight))


def head_kept(hidden: Tensor, weight: Tensor, tokens: Tensor) -> None:
    """The same with the logits kept."""
    head_fused(hidden, weight, tokens, keep_logits=True)


def head_dense(hidden: Tensor, weight: Tensor, tokens: Tensor) -> None:
    """Forward and backward through the log-softmax of all logits."""
    logp = torch.log_softmax(hidden @ weight.T, dim=-1)
    chosen = logp.gather(-1, tokens[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    torch.autograd.grad(chosen.sum() + entropy.sum(), (hidden, weight))


HEADS = {"fused": head_fused, "kept": head_kept, "dense": head_dense}


def bench_head() -> list[Row]:
    """The fused head, its logits computed again or kept, against the dense one and its matrix products alone."""
    hidden, weight, tokens = head_inputs()
    tiles = weight.detach().split(CHUNK)
    rows_ = hidden.detach()

    @torch.no_grad()
    def products(recomputed: bool) -> None:
        by_rows = torch.zeros_like(rows_)
        for tile in tiles:
            if recomputed:
                torch.mm(rows_, tile.T)
            logits = rows_ @ tile.T
            by_rows.addmm_(logits, tile)
            torch.mm(logits.T, rows_)

    fused, kept, dense, four, three = medians(
        *(lambda head=head: head(hidden, weight, tokens) for head in HEADS.values()),
        lambda: products(True),
        lambda: products(False),
        seconds=60.0,
        most=15,
    )
    shape = "x".join(map(str, HEAD))
    peaks = [float(_in_a_process(f"--peak={which}")) for which in HEADS]
    return [
        (f"fused head {shape}", fused, "dense head", dense, "1x wanted"),
        (f"fused head {shape}", fused, "its 4 products", four, "1/1.5x wanted"),
        (f"fused head {shape}, kept", kept, "fused head", fused, "1x wanted"),
        (f"fused head {shape}, kept", kept, "dense head", dense, "1x wanted"),
        (f"fused head {shape}, kept", kept, "its 3 products", three, "1/1.5x wanted"),
        (f"fused head {shape}, MiB", peaks[0], "dense head, MiB", peaks[2], "4x wanted"),
        (f"fused head {shape}, kept, MiB", peaks[1], "dense head, MiB", peaks[2], "2x wanted"),
    ]


def peak(which: str) -> float:
    """MiB by which one forward and backward pass raises the peak resident size of this process."""
    inputs = head_inputs()
    # The libraries' own buffers are not what is measured: a tiny pass creates them.
    small = (inputs[0][:2].detach().requires_grad_(), inputs[1][:8].detach().requires_grad_(), inputs[2][:2] % 8)
    run = HEADS[which]
    run(*small)
    before = peak_mib()
    run(*inputs)
    return peak_mib() - before


def _in_a_process(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.core", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# Row loops.


def rewards_loop(scores: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
    """Rewards as customary: sequence by sequence, the last token looked up in each mask."""
    rows: list[Tensor] = []
    for score, penalty, row in zip(scores, kl, mask, strict=True):
        reward = -0.2 * penalty
        reward[row.nonzero()[-1]] += score
        rows.append(reward)
    return torch.stack(rows)


def moments_loop(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each row's kept entries."""
    kept = [row[row_mask] for row, row_mask in zip(x, mask, strict=True)]
    return torch.stack([row.mean() for row in kept]), torch.stack([row.var() for row in kept])


def whiten_loop(x: Tensor, mask: Tensor) -> Tensor:
    """Each row whitened by its own statistics."""
    rows: list[Tensor] = []
    for row, row_mask in zip(x, mask, strict=True):
        kept = row[row_mask]
        rows.append((row - kept.mean()) * torch.rsqrt(kept.var() + 1e-8) * row_mask)
    return torch.stack(rows)


def bench_rows() -> list[Row]:
    """Functions without a loop over rows against the loop, at [256, 256]."""
    x, mask, scores = torch.randn(256, 256), torch.rand(256, 256) < 0.7, torch.randn(256)

    def whiten_rows() -> Tensor:
        moments = masked_moments(x, mask, dim=-1)
        each = type(moments)(*(field.unsqueeze(-1) for field in moments))
        return whiten(x, mask, each, shift_mean=True, correction=1, eps=1e-8)

    rows: list[Row] = []
    for name, ours, loop in (
        (
            "compute_rewards",
            lambda: compute_rewards(scores, x, mask, kl_coef=0.2),
            lambda: rewards_loop(scores, x, mask),
        ),
        ("masked_moments", lambda: masked_moments(x, mask, dim=-1), lambda: moments_loop(x, mask)),
        ("masked_moments + whiten", whiten_rows, lambda: whiten_loop(x, mask)),
    ):
        fast, slow = medians(ours, loop)
        rows.append((f"{name} [256, 256]", fast, "loop over rows", slow, "10x wanted"))
    return rows


def show(rows: list[Row]) -> None:
    """One line per comparison; the ratio is other / ours."""
    for ours, fast, other, slow, note in rows:
        print(f"{ours:38} {fast:10.3f}   {other:16} {slow:10.3f}   {slow / fast:7.2f}x   {note}", flush=True)


def main() -> None:
    """Print the table, once per number of threads."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.core", description="Measure how fast the core is."
    )
    parser.add_argument("--threads", default="1,2", help="numbers of threads, comma-separated")
    parser.add_argument("--only", default="gae,head,rows", help="which parts, comma-separated")
    parser.add_argument("--compile", action="store_true", help="measure the compiled gae too (a minute of compiling)")
    parser.add_argument("--cpu", action="store_true", help="processor time instead of time of day, one thread only")
    parser.add_argument("--peak", choices=tuple(HEADS), help="print the peak memory of one pass and stop")
    arguments = parser.parse_args()
    if arguments.peak:
        torch.set_num_threads(1)
        print(peak(arguments.peak))
        return
    parts = arguments.only.split(",")
    if arguments.cpu:
        global clock
        clock, arguments.threads = time.thread_time, "1"
    unit = "processor time" if arguments.cpu else "time of day"
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, medians in ms of {unit}")
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        print(f"\n{threads} thread{'s' * (threads > 1)}")
        if "gae" in parts:
            show(bench_gae(compiled=False))
            if arguments.compile:
                show(bench_gae(compiled=True))
        if "head" in parts:
            show(bench_head())
        if "rows" in parts:
            show(bench_rows())


if __name__ == "__main__":
    main()
