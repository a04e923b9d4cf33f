"""The training loop: prompts -> responses -> scores -> step, with a progress bar, metrics on disk and a clean stop."""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

from ppo_runtime import arguments, results
from ppo_runtime.checkpoint import load_checkpoint, newest_good, save_in, steps_done
from ppo_runtime.common import inputs
from ppo_runtime.common.files import alone_in
from ppo_runtime.common.signals import stop_asked
from ppo_runtime.learning import sameness
from ppo_runtime.learning.guards import PATIENCE
from ppo_runtime.learning.inspection import not_finite
from ppo_runtime.ranks.agreement import agree_any, agree_largest, all_or_none
from ppo_runtime.ranks.presence import is_agreed
from ppo_runtime.ranks.world import World
from ppo_runtime.reporting.progress import progress
from ppo_runtime.reporting.statistics import scalars, score_statistics
from ppo_runtime.resuming.files import Damaged
from ppo_runtime.resuming.keeping import check_storable
from ppo_runtime.resuming.position import position, restore_position
from ppo_runtime.rollout.data import collate
from ppo_runtime.rollout.digest import digest_of
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
    """Whether a signal stopped it; what was done until then is on disk."""
    signal: int = 0
    """The number of that signal, the same on all ranks; 0 if it was not interrupted."""


def train(
    trainer: Trainer,
    score_fn: ScoreFunction,
    *,
    steps: int | None = None,
    generation_kwargs: dict[str, Any] | None = None,
    generation_batch_size: int | None = None,
    output_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep_last: int = 2,
    keep_best: bool = False,
    resume: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Train on the trainer's ``dataloader``, epoch after epoch.

    A trainer that has made steps goes on with the prompts behind those that it has drawn, so that two calls are what
    one is, bit for bit; what a step was broken off with is passed over. A dataloader of your own begins again.

    Args:
        trainer: made with a dataset whose rows have "input_ids".
        score_fn: from prompts and responses, as text, to one finite number each; higher is better.
        steps: calls of ``step`` in the whole run; the configuration's ``total_ppo_epochs`` if None.
        generation_kwargs: for ``generate``, over plain sampling of 32 tokens, whatever the model's own settings are.
        generation_batch_size: prompts generated together; as many as memory holds if None.
        output_dir: where the model goes at the end (``model``), and checkpoints (``checkpoint-<step>``). Nothing if
            None. A trainer is refused where another run's results lie, unless it resumes that run; and any where
            another one trains.
        checkpoint_every: steps between checkpoints; None makes one at the end and on a signal only.
        keep_last: how many checkpoints to keep, those of the latest steps.
        keep_best: keep besides the one of the highest mean raw score since the checkpoint before.
        resume: go on from the newest checkpoint there that is whole, bit for bit; from the beginning, with a warning,
            if there is none. A run that has made all its steps is left as it is.
        console: where the progress bar goes; standard error if None.

    Returns:
        The history, which grows by some 2 KiB a step. Ctrl-C, SIGTERM or SIGHUP on any rank finishes the step on all of
        them, leaves a checkpoint and the model, and returns. The second signal does what it does without ``train``:
        Ctrl-C breaks the step off, SIGTERM ends the process; the checkpoint before stays. torchrun passes a signal on
        to all ranks and kills after 30 seconds what has not ended: where a step takes longer, the run goes on from the
        checkpoint before.

    Raises:
        ValueError, TypeError: an argument or the data cannot work; nothing has been generated or written then.
        ValueError: the score function returned something else than numbers; the model as trained so far is saved, if
            a step was made.
        OSError: the disk is full, say; the checkpoint and the model of before are kept.

    Whatever ends a run early, ``model`` holds weights after whole steps. What an update was broken off in goes to
    ``model-broken-off``, and its card says so.
    """
    world = trainer.world
    with all_or_none(world, phase="the check of train's arguments") as ballot:
        if trainer.dataloader is None:
            raise ValueError("the trainer has no dataset, expected one with 'input_ids'; pass dataset= when it is made")
        arguments.check_kinds(score_fn=score_fn, resume=resume, keep_best=keep_best, console=console)
        given = arguments.whole_number("steps", steps, optional=True)
        steps = given or trainer.config.total_ppo_epochs
        every = arguments.whole_number("checkpoint_every", checkpoint_every, optional=True)
        keep_last = arguments.whole_number("keep_last", keep_last, optional=False) or 1
        generated = arguments.whole_number("generation_batch_size", generation_batch_size, optional=True)
        options = arguments.generation_settings(generation_kwargs, GENERATION)
        output = arguments.output_directory(output_dir)
        for name, wanted in {"resume": resume, "checkpoint_every": every}.items():
            if wanted and output is None:
                raise ValueError(f"{name} is {wanted!r} and output_dir is None, expected the directory of the run")
        trainer.response_generator.check(**options)
        _check_data(trainer, options)
        digest_of(trainer.dataloader, again=True)
        newest, done = None, None
        if output is not None:
            check_storable(trainer)
            newest = newest_good(output, every_byte=False)
            done = None if newest is None else steps_done(newest)
            begins = (done or 0) if resume else trainer.current_step
            results.check_places(output, done=begins, steps=steps)
            results.own_directory(trainer, output, newest=newest, done=done, resume=resume)
        ballot.facts = lambda: {
            "steps": steps,
            "checkpoint_every": every,
            "keep_last": keep_last,
            "keep_best": keep_best,
            "resume": resume,
            "output_dir": None if output is None else str(output.absolute()),
            "the step of the checkpoint found": done,
            **sameness.generation(options),
        }
    with _alone_in(output, world):  # only now: the others have looked at the directory
        trainer.generation = sameness.generation(options)
        if resume:
            _resume(trainer, output, newest, steps)
        keep = partial(_keep, trainer, output, keep_last=keep_last, keep_best=keep_best)
        with all_or_none(world, phase="the opening of trackers"):
            if trainer.current_step >= steps:
                why, advice = "steps is %d", "ask for more steps"
                if given is None:
                    why, advice = (
                        "total_ppo_epochs is %d, which config.steps and batch_size make",
                        "pass train more steps",
                    )
                _say(
                    trainer,
                    f"nothing is left to train after step %d, since {why}; {advice}",
                    trainer.current_step,
                    steps,
                )
            elif world.rank == 0:
                arguments.make_writable("logging_dir", trainer.run_log.directory(trainer.config))
                trainer.trackers  # noqa: B018  opened now: a package or a login that is missing shows before the first step
            if world.rank == 0 and trainer.run_log.misses():  # of an earlier call, the last step's too
                trainer.run_log.write_missed(trainer.trackers)
        if trainer.current_step:
            restore_position(trainer, position(trainer))  # a new iteration would begin another epoch
        history: list[dict[str, float]] = []
        interrupted, together, begun = 0, False, trainer.current_step
        # Standard error, so that what a program prints can still be piped.
        console = console or Console(stderr=True)
        with closing(trainer), stop_asked("this step", says=world.rank == 0) as stop:
            try:
                with progress(console, disable=world.rank != 0) as bar:
                    task = bar.add_task("train", total=steps, completed=trainer.current_step, status="")
                    batches = _forever(trainer.dataloader)
                    while begun + len(history) < steps:
                        stats = _next_step(trainer, score_fn, batches, options, generated)
                        history.append(stats)
                        bar.update(task, advance=1, status=_status(stats))
                        due = trainer.current_step == steps or (every is not None and trainer.current_step % every == 0)
                        if due:
                            keep()
                        # Any rank's signal stops all of them, after the same step, and one during a save at once.
                        # In the last step it stops nothing: the run is whole.
                        asked = agree_largest(stop.signal, world, "the question whether to stop")
                        interrupted = asked if trainer.current_step < steps else 0
                        if interrupted:
                            if not due:
                                keep()
                            break
                together = True
            except BaseException as error:
                together = is_agreed(error)
                if not isinstance(error, KeyboardInterrupt):
                    raise
                interrupted = int(signal.SIGINT)
            finally:
                # Without a step there is nothing new, and what lies there may be better than an untrained model.
                changed = trainer.current_step > begun or trainer.broken_off is not None
                if output is not None and (changed or trainer.current_step >= steps):
                    # Where one rank alone has broken off, the others may be anywhere: it waits for none of them.
                    if together or not trainer.parallel.sharded:
                        with all_or_none(world, phase="the saving of results") if together else nullcontext():
                            results.save_results(trainer, output, steps=steps, changed=changed)
                    else:
                        logger.warning(
                            "no model is saved: this rank has a part of it alone; go on from the last checkpoint"
                        )
        if interrupted:
            _say(trainer, "interrupted after step %d of %d", trainer.current_step, steps)
        return TrainResult(history, bool(interrupted), interrupted)


@contextmanager
def _alone_in(output: Path | None, world: World) -> Iterator[None]:
    """Make the directory of a run, and hold it against other processes meanwhile."""
    with ExitStack() as held:
        if output is not None:
            with all_or_none(world, phase="the making of output_dir"):
                arguments.make_writable("output_dir", output)
                if world.rank == 0:
                    try:
                        held.enter_context(alone_in(output))
                    except BlockingIOError as error:
                        raise ValueError(
                            f"output_dir is {str(output)!r}, where another run is going on, expected a directory of "
                            "its own for each; wait until that one has ended, or choose another"
                        ) from error
        yield


@contextmanager
def closing(trainer: Trainer) -> Iterator[None]:
    """Close the trackers whatever happens, and tell them whether it was an error."""
    try:
        yield
    except BaseException:
        trainer.close(failed=True)
        raise
    trainer.close()


def _say(trainer: Trainer, text: str, *values: Any, level: int = logging.WARNING) -> None:
    """Log on one rank what all of them know."""
    if trainer.world.rank == 0:
        logger.log(level, text, *values)


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


def _resume(trainer: Trainer, output: Any, newest: Path | None, steps: int) -> None:
    """Go on from a checkpoint whose weights nobody has looked at yet, or an earlier one if those are damaged."""
    if newest is None:
        made = trainer.current_step
        start = f"goes on after the trainer's step {made}" if made else "starts from the beginning"
        _say(trainer, "there is no checkpoint to resume: the run %s", start)
        return
    try:
        load_checkpoint(trainer, newest)
    except (OSError, ValueError) as error:
        if trainer.world.size > 1 and not is_agreed(error):
            raise
        damage = any(isinstance(found, Damaged | OSError) for found in (error, error.__cause__))
        if not agree_any(damage, trainer.world, "the question whether a checkpoint is damaged"):
            raise
        with all_or_none(trainer.world, phase="the search for an earlier checkpoint") as ballot:
            newest = newest_good(output)
            done = 0 if newest is None else steps_done(newest) or 0
            results.check_places(output, done=done, steps=steps)
            ballot.facts = lambda: {"the step of the checkpoint found": done}
        load_checkpoint(trainer, newest)
    _say(trainer, "resumed after step %d of %d", trainer.current_step, steps, level=logging.INFO)


def _keep(trainer: Trainer, output: Path | None, **kept: Any) -> None:
    """Make a checkpoint, if there is a place for it; its steps have their lines on disk before it is there."""
    if output is None:
        return
    with all_or_none(trainer.world, phase="the writing of metrics"):
        trainer.run_log.sync()
    save_in(output, trainer, **kept)


def _next_step(trainer: Trainer, *given: Any) -> dict[str, float]:
    """A step on the next batch, or on a later one where the configuration has unusable ones dropped."""
    before = trainer.broken_off  # by an earlier step, maybe, that somebody has caught
    for _ in range(PATIENCE - 1):
        try:
            return _one_step(trainer, *given)
        except ValueError as refusal:  # noqa: PERF203  what is refused is why there is a loop
            if not _may_be_dropped(refusal, trainer, moved=trainer.broken_off is not before):
                raise
            _say(trainer, "a batch for step %d is dropped: %s", trainer.current_step + 1, refusal)
    return _one_step(trainer, *given)


def _may_be_dropped(refusal: ValueError, trainer: Trainer, *, moved: bool) -> bool:
    """Whether all ranks have refused a batch for numbers that are not finite, and may go on with the next one."""
    if trainer.config.on_nonfinite != "drop" or moved:
        return False
    if trainer.world.size > 1 and not is_agreed(refusal):
        return False
    return agree_any(not_finite(refusal) is not None, trainer.world, "the question whether to drop a batch")


def _one_step(
    trainer: Trainer,
    score_fn: ScoreFunction,
    batches: Iterator[Any],
    generation_kwargs: dict[str, Any],
    generation_batch_size: int | None,
) -> dict[str, float]:
    started = time.perf_counter()
    config = trainer.config
    step = trainer.current_step + 1
    # The data, the engine and the score function may fail on one rank alone: weights are gathered before.
    with trainer.parallel.whole(), all_or_none(trainer.world, phase=f"the rollout of step {step}"):
        batch = next(batches)
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
    with all_or_none(trainer.world, phase=f"the scores of step {step}"):
        scores = arguments.score_list(score_fn(list(prompts), list(texts)), count=len(texts))
    stats = trainer.step(queries, responses, scores)
    stats["time/loop/step"] = time.perf_counter() - started
    stats |= score_statistics(inputs.score_vector(scores, count=len(scores)), trainer.world)
    trainer.log_stats(stats, {"query": prompts, "response": texts}, scores)
    return scalars(stats)


def _forever(dataloader: Any) -> Iterator[Any]:
    """Batches without end, beginning the dataloader again whenever it ends."""
    while True:
        batch = None
        for batch in dataloader:
            yield batch
        if batch is None:
            raise ValueError(
                "the dataloader gave no batch, expected at least one per epoch; the data is shorter than batch_size, "
                "or a stream that can be read only once has ended"
            )


def _status(stats: dict[str, float]) -> str:
    return f"score {stats['env/reward_mean']:+.3f}  KL {stats['objective/kl']:.2f}"
