"""What the demo says at its end: the numbers of the report, and the samples and tables on the console."""

import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_runtime.demo.options import DemoOptions
from ppo_runtime.reporting.jsonl import read_jsonl

SAMPLES_SHOWN = 3


@attrs.frozen
class Evaluation:
    """Continuations of the held-out prompts and what they score."""

    greedy: list[str]
    sampled: list[str]
    greedy_score: float
    sampled_score: float


def history_of(output: Path) -> list[dict[str, Any]]:
    """The metrics of every step; of one that was made twice, after a resume, the later counts."""
    metrics = output / "metrics.jsonl"
    lines = {line["step"]: line for line in read_jsonl(metrics)} if metrics.exists() else {}
    return [lines[step] for step in sorted(lines)]


def make_report(
    options: DemoOptions, history: list[dict[str, Any]], before: Evaluation, after: Evaluation, *, seconds: float
) -> dict[str, Any]:
    """Scores before and after on held-out prompts, of the first and last steps, KL, time and memory."""
    scores = [stats["env/reward_mean"] for stats in history]
    window = max(1, min(10, len(scores) // 2))
    kl = [stats["objective/kl"] for stats in history][-window:]
    return {
        "steps": len(history),
        "seed": options.seed,
        "score_first_steps": sum(scores[:window]) / window,
        "score_last_steps": sum(scores[-window:]) / window,
        "window": window,
        "kl_last_steps": sum(kl) / window,
        "kl_target": options.target,
        "greedy_before": before.greedy_score,
        "greedy_after": after.greedy_score,
        "sampled_before": before.sampled_score,
        "sampled_after": after.sampled_score,
        "max_first_minibatch_ratio_deviation": max(
            stats["ppo/policy/first_minibatch_ratio_deviation"] for stats in history
        ),
        "seconds": seconds,
        "seconds_per_step": sum(stats["time/loop/step"] for stats in history) / len(history),
        "peak_memory_mib": _peak_memory_mib(),
    }


def samples(prompts: Sequence[str], before: Evaluation, after: Evaluation) -> list[dict[str, str]]:
    """Each prompt with its continuations."""
    return [
        {"prompt": prompt, "greedy_before": gb, "greedy_after": ga, "sampled_before": sb, "sampled_after": sa}
        for prompt, gb, ga, sb, sa in zip(
            prompts, before.greedy, after.greedy, before.sampled, after.sampled, strict=True
        )
    ]


def show(
    console: Console,
    report: dict[str, Any],
    prompts: list[str],
    before: Evaluation,
    after: Evaluation,
    score: Callable[[Sequence[str]], list[float]],
) -> None:
    """Print some samples and the numbers."""
    numbers = Table(title="Mean score", title_justify="left")
    for name in ("", "before", "after", "change"):
        numbers.add_column(name, justify="left" if not name else "right")
    recent = "step" if report["window"] == 1 else f"{report['window']} steps"
    for name, low, high in (
        (
            f"training, first and last {recent}",
            report["score_first_steps"],
            report["score_last_steps"],
        ),
        ("held-out prompts, sampled", report["sampled_before"], report["sampled_after"]),
        ("held-out prompts, greedy", report["greedy_before"], report["greedy_after"]),
    ):
        numbers.add_row(name, f"{low:+.3f}", f"{high:+.3f}", f"{high - low:+.3f}")
    texts = Table(title="Held-out prompts, sampled", title_justify="left", show_lines=True)
    for name in ("prompt", "before", "after"):
        texts.add_column(name)
    scored_before, scored_after = score(before.sampled), score(after.sampled)
    for row in range(min(SAMPLES_SHOWN, len(prompts))):
        texts.add_row(
            Text(prompts[row]),
            Text.assemble(before.sampled[row].strip(), (f" ({scored_before[row]:+.2f})", "dim")),
            Text.assemble(after.sampled[row].strip(), (f" ({scored_after[row]:+.2f})", "dim")),
        )
    console.print(texts)
    console.print(numbers)
    console.print(
        f"KL of the last {recent} {report['kl_last_steps']:.2f} nats per continuation "
        f"(target {report['kl_target']}), {report['seconds']:.0f} s, "
        f"{report['seconds_per_step']:.2f} s per step, peak memory {report['peak_memory_mib']:.0f} MiB"
    )


def _peak_memory_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
