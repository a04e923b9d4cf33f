"""The demo from end to end: load, look, train, look again, save.

A small language model continues openings from Jane Austen's novels. The score is the sentiment of the continuation; the
KL controller keeps the model close to the prose it was trained on.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from ppo_runtime.common.extras import require
from ppo_runtime.common.files import write_whole
from ppo_runtime.common.wording import counted
from ppo_runtime.config import PPOConfig
from ppo_runtime.demo.options import DemoOptions, remember
from ppo_runtime.demo.report import Evaluation, history_of, make_report, samples, show
from ppo_runtime.demo.standing import check_output, finished
from ppo_runtime.loop import train
from ppo_runtime.models.wrapper import AutoModelForCausalLMWithValueHead
from ppo_runtime.ranks.agreement import all_or_none
from ppo_runtime.ranks.seeding import set_seed
from ppo_runtime.ranks.world import world_from_environment
from ppo_runtime.recipe import load_policy, tokenized
from ppo_runtime.reporting.plotting import plot_curves
from ppo_runtime.results import BROKEN_OFF, MODEL
from ppo_runtime.trainer import Trainer

ASSETS = files("ppo_runtime.demo") / "assets"
EVALUATION_SEED = 20_000
CHECKPOINT_EVERY = 10


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the demo and write metrics.jsonl, curves.png, samples.json, report.json and model/ to ``options.output``.

    Returns:
        The report, on the first rank: scores before and after on held-out prompts, of the first and last ten steps, KL,
        time and memory.

    Raises:
        ImportError: vaderSentiment or matplotlib is missing; the message names the extra.
        FileExistsError, FileNotFoundError: the output directory holds a run, or none to resume.
    """
    started, world = time.perf_counter(), world_from_environment()
    if world.rank != 0:
        console = Console(quiet=True)  # the first rank speaks for all
    output = options.output
    with all_or_none(world, phase="the beginning of the demo"):  # none begins to write before the others have looked
        score = sentiment()
        require("matplotlib", extra="demo", wanted_by="the demo, for its curves,")
        check_output(output, resume=options.resume)
        if options.resume and (report := finished(options, console)) is not None:
            return report
        # Metrics and samples speak for themselves; the libraries' own chatter would break the progress bar.
        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        config = settings(options)
        set_seed(options.seed)
        model, tokenizer = load(options.model)
    prompts = load_prompts()
    trainer = Trainer(config, model, tokenizer, dataset=tokenized(prompts["train"], tokenizer))
    parameters = sum(parameter.numel() for parameter in model.pretrained_model.parameters())
    acceleration = trainer.acceleration
    ranks = f" on each of {world.size} ranks" if world.size > 1 else ""
    console.print(
        # Text, not markup: paths, and what a model writes, may hold brackets of their own.
        Panel.fit(
            Text(
                f"model        {options.model or 'embedded (Jane Austen)'}, {parameters / 1e6:.1f} M parameters\n"
                f"score        VADER sentiment of the continuation, -1 to 1\n"
                f"reference    {'eager torch' if acceleration.backend == 'eager' else acceleration.reason}\n"
                f"training     {counted(options.steps, 'step')} of {options.batch_size} continuations of "
                f"{counted(options.new_tokens, 'token')}{ranks}\n"
                f"KL target    {options.target} nats per continuation\n"
                f"output       {output}"
            ),
            title="PPO: more cheerful prose",
        )
    )
    before = evaluate(trainer, prompts["eval"], score, options, console, "held-out prompts, before")
    # Only now: what was refused leaves nothing behind, and no run goes on with it.
    if world.rank == 0:
        remember(options)
    result = train(
        trainer,
        lambda _, texts: score(texts),
        steps=options.steps,
        generation_kwargs={"max_new_tokens": options.new_tokens},
        output_dir=output,
        checkpoint_every=CHECKPOINT_EVERY,
        resume=options.resume,
        console=console,
    )
    history = history_of(output) if world.rank == 0 else []
    if world.rank == 0 and not history and not result.interrupted:
        raise ValueError(
            f"{output / 'metrics.jsonl'} has no step, expected those of the run, for its report; put the file back, or "
            "ask for more steps with --steps"
        )
    if history:
        plot_curves(history, output / "curves.png", f"PPO demo, seed {options.seed}", kl_target=options.target)
    if result.interrupted:
        there = [name for name in (MODEL, BROKEN_OFF) if (output / name).exists()]
        there += ["metrics.jsonl", "curves.png"] if history else []
        said = f"Stopped after step {trainer.current_step} of {options.steps}"
        said += f", with {', '.join(there)} in {output}" if there else ""
        console.print(Text(f"{said}. Go on with --resume --output {output}", style="yellow"))
        raise SystemExit(128 + result.signal)  # as a shell has it
    after = evaluate(trainer, prompts["eval"], score, options, console, "held-out prompts, after")
    if world.rank != 0:
        return {}
    report = make_report(options, history, before, after, seconds=time.perf_counter() - started)
    _write_json(output / "report.json", report | {"acceleration": attrs.asdict(trainer.acceleration)})
    _write_json(output / "samples.json", samples(prompts["eval"], before, after))
    show(console, report, prompts["eval"], before, after, score)
    AutoModelForCausalLM.from_pretrained(output / "model")  # what was saved is what others can load
    files = "model/, checkpoint-<step>/, metrics.jsonl, curves.png, samples.json, report.json"
    console.print(Text.assemble("Saved to ", (str(output), "bold"), f": {files}"))
    return report


def settings(options: DemoOptions) -> PPOConfig:
    """The configuration of a run."""
    return PPOConfig(
        exp_name="demo",
        seed=options.seed,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        mini_batch_size=options.batch_size // 2,
        steps=options.steps * options.batch_size,
        ppo_epochs=3,
        init_kl_coef=0.08,
        target=options.target,
        horizon=options.batch_size * 5,
        gamma=1.0,
        lam=0.95,
        max_grad_norm=1.0,
        accel=options.accel,
        accel_strict=options.accel in ("ipex", "compile"),  # who asks for it by name on a command line wants to know
        project_kwargs={"logging_dir": str(options.output)},
    )


def sentiment() -> Callable[[Sequence[str]], list[float]]:
    """VADER's compound score of each text, -1 (negative) to 1 (positive)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("the demo scores text with VADER: pip install 'ppo-core[demo]'") from error
    analyser = SentimentIntensityAnalyzer()
    return lambda texts: [float(analyser.polarity_scores(text)["compound"]) for text in texts]


def load(directory: Path | None) -> tuple[AutoModelForCausalLMWithValueHead, Any]:
    """The policy in float32, with a value head that starts at 0, and its tokenizer."""
    with as_file(ASSETS) as assets:
        return load_policy(assets if directory is None else directory, zero_head=True, dtype=torch.float32)


def load_prompts() -> dict[str, list[str]]:
    """Openings of held-out passages by split, "train" and "eval"."""
    lines = (ASSETS / "prompts.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return {split: [row["prompt"] for row in rows if row["split"] == split] for split in ("train", "eval")}


def evaluate(
    trainer: Trainer,
    prompts: list[str],
    score: Callable[[Sequence[str]], list[float]],
    options: DemoOptions,
    console: Console,
    status: str,
) -> Evaluation:
    """Greedy and sampled continuations; always the same random numbers, and the run's own are left untouched."""
    tokenizer = trainer.tokenizer
    queries = [torch.tensor(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    texts: dict[bool, list[str]] = {}
    with console.status(status), torch.random.fork_rng(devices=[]):
        torch.manual_seed(EVALUATION_SEED)
        for sample in (False, True):
            sampling = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sample else {}
            responses = trainer.generate(
                queries,
                batch_size=32,
                return_prompt=False,
                max_new_tokens=options.new_tokens,
                do_sample=sample,
                **sampling,
            )
            texts[sample] = tokenizer.batch_decode(responses, skip_special_tokens=True)
    greedy, sampled = score(texts[False]), score(texts[True])
    return Evaluation(texts[False], texts[True], sum(greedy) / len(greedy), sum(sampled) / len(sampled))


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
