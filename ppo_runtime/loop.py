"""The training loop: prompts -> responses -> scores -> step, with a progress bar, metrics on disk and a clean stop."""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint
from ppo_runtime.distributed import agree_any
from ppo_runtime.redact import plain_settings
from ppo_runtime.statistics import scalars

if TYPE_CHECKING:
    from ppo_runtime.trainer import PPOTrainer

logger = logging.getLogger(__name__)

ScoreFunction = Callable[[list[str], list[str]], Sequence[float]]
GENERATION = {"max_new_tokens": 32, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}


@attrs.frozen
class TrainResult:
    """What a training run did."""

    history: list[dict[str, float]]
    """The scalar statistics of every step that this call made."""
    interrupted: bool
    """Whether it was stopped by Ctrl-C; what was done until then is on disk."""


def train(
    trainer: "PPOTrainer",
    score_fn: ScoreFunction,
    *,
    steps: int | None = None,
    generation_kwargs: dict[str, Any] | None = None,
    generation_batch_size: int | None = None,
    output_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Train on the trainer's ``dataloader``, epoch after epoch.

    Args:
        trainer: made with a dataset whose rows have "input_ids".
        score_fn: from prompts and responses, as text, to one finite number each; higher is better.
        steps: calls of ``step`` in the whole run; the configuration's ``total_ppo_epochs`` if None.
        generation_kwargs: for ``generate``, over plain sampling of 32 tokens.
        generation_batch_size: prompts generated together; a whole batch if None.
        output_dir: where the model goes at the end (``model``), and checkpoints (``checkpoint``). Nothing if None.
        checkpoint_every: steps between checkpoints; None makes one on Ctrl-C only.
        resume: go on from ``<output_dir>/checkpoint``, bit for bit, if there is one.
        console: where the progress bar goes; standard error if None.

    Returns:
        The history. The first Ctrl-C finishes the step, leaves a checkpoint and the model, and returns; the second
        stops at once and keeps the checkpoint before.

    Raises:
        ValueError: the trainer has no dataset, or the score function returned something else than numbers; the
            model as trained so far is saved first.
    """
    if trainer.dataloader is None:
        raise ValueError("the trainer has no dataset, expected one with 'input_ids'; pass dataset= to PPOTrainer")
    if resume and output_dir is None:
        raise ValueError("resume is True and output_dir is None, expected the output_dir of the run to go on with")
    steps = trainer.config.total_ppo_epochs if steps is None else steps
    options = GENERATION | (generation_kwargs or {})
    output = None if output_dir is None else Path(output_dir)
    checkpoint = None if output is None else output / "checkpoint"
    if resume and checkpoint is not None and checkpoint.exists():
        load_checkpoint(trainer, checkpoint)
        logger.info("resumed after %d of %d steps", trainer.current_step, steps)
    history: list[dict[str, float]] = []
    interrupted = False
    # Standard error, so that what a program prints can still be piped.
    console = console or Console(stderr=True)
    try:
        with _stop_requested() as stop, _progress(console, disable=trainer.world.rank != 0) as bar:
            task = bar.add_task("train", total=steps, completed=trainer.current_step, status="")
            for batch in _forever(trainer.dataloader, steps - trainer.current_step):
                stats = _one_step(trainer, score_fn, batch, options, generation_batch_size)
                history.append(stats)
                bar.update(task, advance=1, status=_status(stats))
                # Any rank's Ctrl-C stops all of them, after the same step.
                interrupted = agree_any(stop.is_set(), trainer.world)
                due = checkpoint_every is not None and trainer.current_step % checkpoint_every == 0
                if checkpoint is not None and (due or interrupted):
                    save_checkpoint(trainer, checkpoint)
                if interrupted:
                    break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        trainer.close()
        if output is not None:
            _save(trainer, output, steps=steps)
    if interrupted:
        logger.warning("interrupted after %d of %d steps", trainer.current_step, steps)
    return TrainResult(history, interrupted)


def _one_step(
    trainer: "PPOTrainer",
    score_fn: ScoreFunction,
    batch: dict[str, Any],
    generation_kwargs: dict[str, Any],
    generation_batch_size: int | None,
) -> dict[str, float]:
    started = time.perf_counter()
    queries = [torch.as_tensor(ids) for ids in batch["input_ids"]]
    responses = trainer.generate(
        queries,
        batch_size=generation_batch_size or len(queries),
        return_prompt=False,
        **generation_kwargs,
    )
    prompts = batch.get("query") or trainer.tokenizer.batch_decode(queries, skip_special_tokens=True)
    texts = trainer.tokenizer.batch_decode(responses, skip_special_tokens=True)
    values = score_fn(list(prompts), texts)
    scores = [torch.as_tensor(float(value)) for value in values]
    stats = trainer.step(queries, responses, scores)
    stats["time/loop/step"] = time.perf_counter() - started
    trainer.log_stats(stats, {"query": prompts, "response": texts}, scores)
    return scalars(stats) | {"env/reward_mean": sum(map(float, scores)) / len(scores)}


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(_number: int, _frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)
        logger.warning("finishing this step, then stopping; press Ctrl-C again to stop at once")

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _forever(dataloader: Any, steps: int) -> Iterator[Any]:
    """``steps`` batches, beginning the dataloader again whenever it ends."""
    done = 0
    while done < steps:
        before = done
        for batch in dataloader:
            yield batch
            done += 1
            if done == steps:
                return
        if done == before:
            raise ValueError(
                "the dataloader gave no batch, expected at least one per epoch; the data is shorter than batch_size, "
                "or a stream that can be read only once has ended"
            )


def _status(stats: dict[str, float]) -> str:
    return f"score {stats['env/reward_mean']:+.3f}  KL {stats['objective/kl']:.2f}"


def _progress(console: Console, *, disable: bool) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )


def _save(trainer: "PPOTrainer", output_dir: Path, *, steps: int) -> None:
    trainer.save_pretrained(output_dir / "model")
    if trainer.world.rank == 0:
        run = {
            "steps": steps,
            "steps_done": trainer.current_step,
            "kl_coef": trainer.kl_ctl.value,
            "acceleration": attrs.asdict(trainer.acceleration),
            "config": plain_settings(trainer.config),
        }
        (output_dir / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")
    if not all(math.isfinite(p.sum().item()) for p in trainer.model.parameters()):
        logger.warning("the saved model in %s holds weights that are not finite", output_dir)
