"""The training loop: prompts -> responses -> scores -> step, with a progress bar, metrics on disk and a clean stop."""

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ppo_runtime import arguments
from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint, steps_done
from ppo_runtime.common import inputs
from ppo_runtime.common.files import filled_whole, write_whole
from ppo_runtime.common.redact import plain_settings
from ppo_runtime.ranks.gather import agree_any
from ppo_runtime.reporting.model_card import is_ours
from ppo_runtime.reporting.statistics import scalars, score_statistics
from ppo_runtime.resuming.keeping import check_storable
from ppo_runtime.rollout.data import collate
from ppo_runtime.rollout.prompts import batch_prompts, batch_texts, check_dataset
from ppo_runtime.rollout.room import prompt_room
from ppo_runtime.trainer import Trainer

logger = logging.getLogger(__name__)

ScoreFunction = Callable[[list[str], list[str]], Sequence[float]]
GENERATION = {"max_new_tokens": 32}


@attrs.frozen
class TrainResult:
    """What a training run did."""

    history: list[dict[str, float]]
    """The scalar statistics of every step that this call made: about 2 KiB of memory for each. metrics.jsonl has them
    on disk."""
    interrupted: bool
    """Whether it was stopped by Ctrl-C; what was done until then is on disk."""


def train(
    trainer: Trainer,
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
        generation_kwargs: for ``generate``, over plain sampling of 32 tokens, whatever the model's own settings are.
        generation_batch_size: prompts generated together; as many as memory holds if None.
        output_dir: where the model goes at the end (``model``), and the checkpoint (``checkpoint``). Nothing if None. A
            fresh trainer is refused where another run's checkpoint lies, unless it resumes it.
        checkpoint_every: steps between checkpoints; None makes one at the end and on Ctrl-C only.
        resume: go on from ``<output_dir>/checkpoint``, bit for bit; from the beginning, with a warning, if there is
            none.
        console: where the progress bar goes; standard error if None.

    Returns:
        The history, which grows by some 2 KiB a step. The first Ctrl-C finishes the step, leaves a checkpoint and the
        model, and returns; the second stops at once and keeps the checkpoint before.

    Raises:
        ValueError, TypeError: an argument or the data cannot work; nothing has been generated or written then.
        ValueError: the score function returned something else than numbers; the model as trained so far is saved, if
            a step was made.

    Whatever ends a run early, ``model`` holds weights after whole steps. What an update was broken off in goes to
    ``model-broken-off``, and its card says so.
    """
    if trainer.dataloader is None:
        raise ValueError("the trainer has no dataset, expected one with 'input_ids'; pass dataset= when it is made")
    arguments.check_kinds(score_fn=score_fn, resume=resume, console=console)
    steps = arguments.whole_number("steps", steps, optional=True) or trainer.config.total_ppo_epochs
    every = arguments.whole_number("checkpoint_every", checkpoint_every, optional=True)
    generated = arguments.whole_number("generation_batch_size", generation_batch_size, optional=True)
    options = arguments.generation_settings(generation_kwargs, GENERATION)
    output = arguments.output_directory(output_dir)
    for name, wanted in {"resume": resume, "checkpoint_every": every}.items():
        if wanted and output is None:
            raise ValueError(f"{name} is {wanted!r} and output_dir is None, expected the directory of the run")
    trainer.response_generator.check(**options)
    _check_data(trainer, options)
    checkpoint = None if output is None else output / arguments.CHECKPOINT
    if output is not None and checkpoint is not None:
        check_storable(trainer)
        arguments.check_places(output)
        done = steps_done(checkpoint)
        arguments.own_directory(output, done=done, resume=resume, current_step=trainer.current_step)
        arguments.make_writable("output_dir", output)
    if resume and checkpoint is not None:
        _resume(trainer, checkpoint, steps)
    if trainer.current_step >= steps:
        logger.warning(
            "nothing is left to train after step %d, since steps is %d; ask for more steps", trainer.current_step, steps
        )
    elif trainer.world.rank == 0:
        arguments.make_writable("logging_dir", trainer.config.logging_dir)
        trainer.trackers  # noqa: B018  opened now: a package or a login that is missing shows before the first step
    history: list[dict[str, float]] = []
    interrupted, begun = False, trainer.current_step
    # Standard error, so that what a program prints can still be piped.
    console = console or Console(stderr=True)
    with closing(trainer):
        try:
            with _stop_requested() as stop, _progress(console, disable=trainer.world.rank != 0) as bar:
                task = bar.add_task("train", total=steps, completed=trainer.current_step, status="")
                for batch in _forever(trainer.dataloader, steps - trainer.current_step):
                    stats = _one_step(trainer, score_fn, batch, options, generated)
                    history.append(stats)
                    bar.update(task, advance=1, status=_status(stats))
                    # Any rank's Ctrl-C stops all of them, after the same step.
                    # In the last one it stops nothing: the run is whole.
                    interrupted = agree_any(stop.is_set(), trainer.world) and trainer.current_step < steps
                    due = every is not None and trainer.current_step % every == 0
                    if checkpoint is not None and (due or interrupted or trainer.current_step == steps):
                        save_checkpoint(trainer, checkpoint)
                    if interrupted:
                        break
        except KeyboardInterrupt:
            interrupted = True
        finally:
            # Without a step there is nothing new, and what lies there may be better than an untrained model.
            changed = trainer.current_step > begun or trainer.broken_off is not None
            if output is not None and (changed or trainer.current_step >= steps):
                _save(trainer, output, steps=steps)
    if interrupted:
        logger.warning("interrupted after step %d of %d", trainer.current_step, steps)
    return TrainResult(history, interrupted)


@contextmanager
def closing(trainer: Trainer) -> Iterator[None]:
    """Close the trackers whatever happens, and tell them whether it was an error."""
    try:
        yield
    except BaseException:
        trainer.close(failed=True)
        raise
    trainer.close()


def _check_data(trainer: Trainer, generation_kwargs: dict[str, Any]) -> None:
    """Look at the prompts themselves, where no collator of the user's own makes others of them."""
    loader = trainer.dataloader
    if getattr(loader, "collate_fn", None) is not collate:
        return
    room = prompt_room(trainer, generation_kwargs)
    check_dataset(
        getattr(loader, "dataset", None),
        vocab_size=trainer.model.config.vocab_size,
        room=room,
    )


def _resume(trainer: Trainer, checkpoint: Path, steps: int) -> None:
    if steps_done(checkpoint) is None:
        logger.warning("there is no checkpoint in %s to resume: the run starts from the beginning", checkpoint)
        return
    load_checkpoint(trainer, checkpoint)
    logger.info("resumed after step %d of %d", trainer.current_step, steps)


def _one_step(
    trainer: Trainer,
    score_fn: ScoreFunction,
    batch: Any,
    generation_kwargs: dict[str, Any],
    generation_batch_size: int | None,
) -> dict[str, float]:
    started = time.perf_counter()
    config = trainer.config
    queries = batch_prompts(batch, vocab_size=trainer.model.config.vocab_size)
    inputs.batch_count(len(queries), batch_size=config.batch_size, drop_last=config.drop_last)
    prompts = batch_texts(batch, queries, trainer.tokenizer)
    responses = trainer.generate(
        queries,
        batch_size=generation_batch_size,
        return_prompt=False,
        **generation_kwargs,
    )
    texts = trainer.tokenizer.batch_decode(responses, skip_special_tokens=True)
    scores = arguments.score_list(score_fn(list(prompts), list(texts)), count=len(texts))
    stats = trainer.step(queries, responses, scores)
    stats["time/loop/step"] = time.perf_counter() - started
    stats |= score_statistics(inputs.score_vector(scores, count=len(scores)), trainer.world)
    trainer.log_stats(stats, {"query": prompts, "response": texts}, scores)
    return scalars(stats)


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second interrupts as usual."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    # Only the main thread may handle signals; a job in the background ignores them on purpose; and a handler that was
    # not set from Python (None) could not be put back.
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield stop
        return

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


def _save(trainer: Trainer, output_dir: Path, *, steps: int) -> None:
    model = output_dir / (arguments.BROKEN_OFF if trainer.broken_off else arguments.MODEL)
    if trainer.world.rank == 0:
        with filled_whole(model, replaces=_not_a_users_card) as draft:
            trainer.save_pretrained(draft)
        run = {
            "steps": max(steps, trainer.current_step),
            "steps_done": trainer.current_step,
            "broken_off": trainer.broken_off,
            "kl_coef": trainer.kl_ctl.value,
            "acceleration": attrs.asdict(trainer.acceleration),
            "config": plain_settings(trainer.config),
        }
        write_whole(output_dir / arguments.RECORD, json.dumps(run, indent=2, default=str) + "\n")
    if trainer.broken_off:
        logger.warning(
            "weights between two steps are in %s; those after step %d in the last checkpoint",
            model,
            trainer.current_step,
        )
    if not all(bool(p.isfinite().all()) for p in trainer.model.parameters() if p.requires_grad):
        logger.warning("the saved model in %s holds weights that are not finite", model)


def _not_a_users_card(file: Path) -> bool:
    return file.name != "README.md" or is_ours(file.parent)
