"""One rank of two goes wrong, in every way: how long the other one takes to say so, and in which words.

``python -m tests.runtime.ranks.matrix`` prints the table, ``--help`` how to have a part of it;
``... matrix FOLDER CASES CULPRIT ENGINE`` is one rank of it.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import attrs
import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ppo_runtime.trainer
from ppo_runtime import PPOTrainer
from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint
from ppo_runtime.learning.update import clipped_objective
from ppo_runtime.loop import train
from ppo_runtime.resuming import files
from tests.runtime.support import trainers
from tests.runtime.support.processes import Ended, ends_of_ranks
from tests.runtime.support.tiny import tiny_lora, tiny_model, tiny_tokenizer

LIMIT = 120.0
"""Seconds after which a case counts as hanging."""
PATIENCE = 5.0
"""The ranks' timeout where one of them hangs."""
ENGINES = "ddp", "fsdp2"


@attrs.frozen
class Rank:
    """One of the processes, and whether it is the one that goes wrong."""

    number: int
    wrong: bool
    engine: str
    folder: Path

    def trainer(self, **options: Any) -> PPOTrainer:
        """Of three rows a step on each rank."""
        settings = {"batch_size": 3, "mini_batch_size": 3, "project_kwargs": {"logging_dir": str(self.folder / "logs")}}
        settings["parallelism"] = self.engine
        return trainers.make_trainer(**(settings | options))

    def batch(self) -> list[list[torch.Tensor]]:
        """This rank's part of six rows."""
        return [list(part[3 * self.number : 3 * self.number + 3]) for part in trainers.make_batch()]

    def goes_wrong(self) -> bool:
        """Whether it does, here and now; from then on the time counts."""
        if self.wrong:
            (self.folder / "began").write_text(str(time.time()))
        return self.wrong

    def train(self, scores: Callable[[list[str]], Sequence[Any]], **options: Any) -> Any:
        """Three steps of the loop; the score function is the case's from the second step on."""
        rows = Dataset.from_dict({"query": ["q"] * 12, "input_ids": [[5 + row] for row in range(12)]})
        calls = 0

        def score(_: list[str], texts: list[str]) -> Sequence[Any]:
            nonlocal calls
            calls += 1
            return [1.0] * len(texts) if calls == 1 else scores(texts)

        return train(
            self.trainer(dataset=rows, tokenizer=tiny_tokenizer(), **options),
            score,
            steps=3,
            generation_kwargs={"max_new_tokens": 4},
            output_dir=self.folder / "run",
            console=Console(file=io.StringIO()),
        )


Case = Callable[[Rank], None]


# --- what one rank finds wrong by itself: both refuse it, and are in step afterwards ---------------------------------


def score_function_raises(rank: Rank) -> None:
    def scores(texts: list[str]) -> list[float]:
        if rank.goes_wrong():
            raise ZeroDivisionError("the judge divides")
        return [1.0] * len(texts)

    rank.train(scores)


def score_is_nan(rank: Rank) -> None:
    rank.train(lambda texts: [float("nan") if rank.goes_wrong() else 1.0] * len(texts))


def scores_are_too_few(rank: Rank) -> None:
    rank.train(lambda texts: [1.0] * (len(texts) - rank.goes_wrong()))


def row_is_too_long(rank: Rank) -> None:
    trainer, (queries, responses, scores) = rank.trainer(), rank.batch()
    if rank.goes_wrong():
        responses[1] = torch.full((100,), 7)
    trainer.step(queries, responses, scores)


def sequences_are_too_few(rank: Rank) -> None:
    trainer, batch = rank.trainer(), rank.batch()
    trainer.step(*(part[: 3 - rank.goes_wrong()] for part in batch))


def other_mini_batches(rank: Rank) -> None:
    trainer = rank.trainer()
    if rank.goes_wrong():
        trainer.config.mini_batch_size = 1
    trainer.step(*rank.batch())


def other_learning_rate(rank: Rank) -> None:
    trainer = rank.trainer()
    if rank.goes_wrong():
        trainer.optimizer.param_groups[0]["lr"] = 0.5
    trainer.step(*rank.batch())


def other_kl_coefficient(rank: Rank) -> None:
    trainer = rank.trainer()
    if rank.goes_wrong():
        trainer.kl_ctl.value = 0.5
    trainer.step(*rank.batch())


def other_weights(rank: Rank) -> None:
    """Of which a divided model has no copy that could differ."""
    trainer = rank.trainer()
    if rank.goes_wrong():
        next(trainer.model.v_head.parameters()).data.add_(1e-6)
    trainer.step(*rank.batch())


def other_moments(rank: Rank) -> None:
    def optimizer_of(model: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(model.parameters())
        if rank.goes_wrong():
            model.v_head.summary.weight.grad = torch.ones_like(model.v_head.summary.weight)
            optimizer.step()
        return optimizer

    rank.trainer(optimizer_of=optimizer_of)


def other_checkpointing(rank: Rank) -> None:
    trainer = rank.trainer()
    if rank.goes_wrong():
        trainer.model.pretrained_model.gradient_checkpointing_enable({"use_reentrant": True})
    trainer.step(*rank.batch())


def other_layer_frozen(rank: Rank) -> None:
    """After the trainer was made, and on each rank another one."""
    trainer = rank.trainer()
    trainer.model.pretrained_model.model.layers[int(rank.goes_wrong())].requires_grad_(False)
    trainer.step(*rank.batch())


def other_embedding_frozen(rank: Rank) -> None:
    """After the trainer was made, and on one rank alone."""
    trainer = rank.trainer()
    trainer.model.pretrained_model.get_input_embeddings().requires_grad_(not rank.goes_wrong())
    trainer.step(*rank.batch())


def model_without_numbers(rank: Rank) -> None:
    rank.trainer(placed=lambda model: model.to("meta") if rank.goes_wrong() else model)


def other_settings(rank: Rank) -> None:
    rank.trainer(mini_batch_size=1 if rank.goes_wrong() else 3)


def other_model(rank: Rank) -> None:
    rank.trainer(layers=1 if rank.goes_wrong() else 2)


def other_lora(rank: Rank) -> None:
    rank.trainer(peft_config=tiny_lora("llama", lora_alpha=64 if rank.goes_wrong() else 4))


def other_dropout(rank: Rank) -> None:
    rank.trainer(dropout=0.5 * rank.goes_wrong())


def other_attention(rank: Rank) -> None:
    def placed(model: Any) -> Any:
        model.pretrained_model.set_attn_implementation("eager" if rank.goes_wrong() else "sdpa")
        return model

    rank.trainer(placed=placed)


def other_reference(rank: Rank) -> None:
    rank.trainer(ref_model=tiny_model("llama", rms_norm_eps=1.0 if rank.goes_wrong() else 1e-6))


def other_tokens(rank: Rank) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"] * rank.goes_wrong())
    rank.trainer(tokenizer=tokenizer)


def no_tokenizer(rank: Rank) -> None:
    trainer = rank.trainer()
    PPOTrainer(trainer.config, trainer.model, None, None if rank.goes_wrong() else trainer.tokenizer)


def reference_on_one(rank: Rank) -> None:
    rank.trainer(ref_model=tiny_model("llama", seed=1) if rank.goes_wrong() else None)


def other_rows(rank: Rank) -> None:
    rank.trainer(dataset=Dataset.from_dict({"input_ids": [[5]] * (12 - rank.goes_wrong())}))


def other_prompt(rank: Rank) -> None:
    """One of many."""
    rows = [[5 + row % 50] for row in range(300)]
    rows[1] = [6, 7] if rank.goes_wrong() else [6]
    rank.trainer(dataset=Dataset.from_dict({"input_ids": rows}))


def keys_differ(rank: Rank) -> None:
    trainer = rank.trainer()
    trainer.gather_stats({"loss": torch.ones(())} | ({"more": torch.ones(())} if rank.goes_wrong() else {}))


def reward_is_refused(rank: Rank) -> None:
    trainer = rank.trainer()
    trainer.log_stats({}, {}, [1.0, float("nan") if rank.goes_wrong() else 2.0, 3.0])


def disk_is_full(rank: Rank) -> None:
    """While a checkpoint is written: the rank's own part, which every rank has."""
    trainer, written = rank.trainer(), files.write_json

    def full(path: Path, value: Any) -> None:
        if rank.goes_wrong():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written(path, value)

    files.write_json = full
    try:
        save_checkpoint(trainer, rank.folder / "checkpoint")
    finally:
        files.write_json = written


def tracker_fails(rank: Rank) -> None:
    """Of the first rank, which alone has any; where the other one goes wrong, it is another rank's reward."""
    trainer = rank.trainer()
    if rank.number == 0 and rank.goes_wrong():
        trainer.run_log._trackers = [object()]
    trainer.log_stats({}, {}, [1.0, float("nan") if rank.number == 1 and rank.goes_wrong() else 2.0, 3.0])


# --- what one rank alone calls, while the other makes a step ---------------------------------------------------------


def _called_alone(name: str, call: Callable[[Rank, PPOTrainer], Any]) -> Case:
    def case(rank: Rank) -> None:
        trainer = rank.trainer()
        if rank.goes_wrong():
            call(rank, trainer)
        trainer.step(*rank.batch())

    case.__name__ = f"{name}_alone"
    return case


def _enter(context: AbstractContextManager[Any]) -> None:
    with context:
        pass


def _passed(rank: Rank, trainer: PPOTrainer) -> None:
    queries, responses, _ = rank.batch()
    with torch.no_grad():
        inputs = trainer.prepare_model_inputs(queries, responses)
        trainer.batched_forward_pass(trainer.model, queries, responses, inputs)


def _uploaded(rank: Rank, trainer: PPOTrainer) -> None:
    with mock.patch.object(ppo_runtime.trainer, "upload", return_value=None):
        trainer.push_to_hub("mine")


def _trained(rank: Rank, trainer: PPOTrainer) -> None:
    trainer.dataloader = trainer.prepare_dataloader(Dataset.from_dict({"input_ids": [[5]] * 6}))
    train(trainer, lambda _, texts: [1.0] * len(texts), steps=1, console=Console(file=io.StringIO()))


COLLECTIVES: dict[str, Callable[[Rank, PPOTrainer], Any]] = {
    "log_stats": lambda rank, trainer: trainer.log_stats({}, {}, [1.0, 2.0, 3.0]),
    "gather_stats": lambda rank, trainer: trainer.gather_stats({"loss": torch.ones(())}),
    "accelerator_gather": lambda rank, trainer: trainer.accelerator.gather(torch.ones(2)),
    "wait_for_everyone": lambda rank, trainer: trainer.accelerator.wait_for_everyone(),
    "save_checkpoint": lambda rank, trainer: save_checkpoint(trainer, rank.folder / "checkpoint"),
    "load_checkpoint": lambda rank, trainer: load_checkpoint(trainer, rank.folder / "nothing"),
    "train": _trained,
    "another_trainer": lambda rank, trainer: rank.trainer(),
}
# Only where every rank holds a part of the models.
WHERE_DIVIDED: dict[str, Callable[[Rank, PPOTrainer], Any]] = {
    "save_pretrained": lambda rank, trainer: trainer.save_pretrained(rank.folder / "model"),
    "push_to_hub": _uploaded,
    "generate": lambda rank, trainer: trainer.generate([torch.tensor([5])], max_new_tokens=2),
    "whole": lambda rank, trainer: _enter(trainer.parallel.whole()),
    "forward_pass": _passed,
}


# --- what parts the ranks: the other one can only end, and say why ---------------------------------------------------


def killed(rank: Rank) -> None:
    def scores(texts: list[str]) -> list[float]:
        if rank.goes_wrong():
            os.kill(os.getpid(), signal.SIGKILL)
        return [1.0] * len(texts)

    rank.train(scores)


def killed_in_an_update(rank: Rank) -> None:
    trainer, calls = rank.trainer(ppo_epochs=4), 0

    def objective(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and rank.goes_wrong():
            os._exit(3)
        return clipped_objective(*args, **options)

    trainer.policy_objective = objective
    trainer.step(*rank.batch())


def raises_in_an_update(rank: Rank) -> None:
    trainer, calls = rank.trainer(ppo_epochs=4), 0

    def objective(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and rank.goes_wrong():
            raise MemoryError("no room for the gradients")
        return clipped_objective(*args, **options)

    trainer.policy_objective = objective
    trainer.step(*rank.batch())


def raises_in_a_pass(rank: Rank) -> None:
    """In a layer, whose weights the others gather where each has a part of them."""
    trainer = rank.trainer()

    def refuse(*_: Any) -> None:
        if torch.is_grad_enabled() and rank.goes_wrong():
            raise MemoryError("no room for the layer")

    trainer.model.pretrained_model.model.layers[0].mlp.register_forward_pre_hook(refuse)
    trainer.step(*rank.batch())


def raises_between_steps(rank: Rank) -> None:
    trainer = rank.trainer()
    trainer.step(*rank.batch())
    if rank.goes_wrong():
        raise LookupError("a line of the script")
    trainer.step(*rank.batch())


def ends_earlier(rank: Rank) -> None:
    trainer = rank.trainer()
    trainer.step(*rank.batch())
    if not rank.goes_wrong():
        trainer.step(*rank.batch())


def hangs(rank: Rank) -> None:
    trainer = rank.trainer(ranks_timeout=PATIENCE)
    trainer.step(*rank.batch())
    if rank.goes_wrong():
        time.sleep(4 * PATIENCE)
    trainer.step(*rank.batch())


def told_to_end(rank: Rank) -> None:
    """By SIGTERM, as a cluster does it."""

    def scores(texts: list[str]) -> list[float]:
        if rank.goes_wrong():
            os.kill(os.getpid(), signal.SIGTERM)
        return [1.0] * len(texts)

    rank.train(scores)


AGREED: tuple[Case, ...] = (
    *(score_function_raises, score_is_nan, scores_are_too_few, row_is_too_long, sequences_are_too_few),
    *(other_layer_frozen, other_embedding_frozen, model_without_numbers),
    *(other_weights, other_moments, other_checkpointing),
    *(other_mini_batches, other_learning_rate, other_kl_coefficient, other_settings, other_model, no_tokenizer),
    *(other_lora, other_dropout, other_attention, other_reference, other_tokens),
    *(reference_on_one, other_rows, other_prompt, keys_differ, reward_is_refused, tracker_fails, disk_is_full),
    raises_in_an_update,
)
PARTING: tuple[Case, ...] = (
    *(killed, killed_in_an_update, raises_in_a_pass, raises_between_steps, ends_earlier, hangs, told_to_end),
)
CALLED_ALONE = tuple(_called_alone(*one) for one in (COLLECTIVES | WHERE_DIVIDED).items())
"""Both are told, and are in step afterwards."""
CASES = {case.__name__: case for case in (*AGREED, *CALLED_ALONE, *PARTING)}


class Found(NamedTuple):
    """What became of one rank."""

    kind: str
    """Of its error; empty without one."""
    message: str
    seconds: float | None
    """Since the other one went wrong."""


def tried(case: str, rank: Rank) -> tuple[Found, BaseException | None]:
    """What became of this rank in a case, and the error that it has raised."""
    error: BaseException | None = None
    try:
        CASES[case](rank)
    except BaseException as found:
        error = found
    began = rank.folder / "began"
    seconds = time.time() - float(began.read_text()) if began.exists() else None
    return Found("" if error is None else type(error).__name__, "" if error is None else str(error), seconds), error


def be_one_rank(folder: Path, cases: Sequence[str], culprit: int, engine: str) -> None:
    """Try some cases, write down what became of each, and end as a script would that has raised the same.

    Only of cases whose refusals the ranks agree on, several can be tried: they are in step afterwards.
    """
    torch.set_num_threads(1)
    number = int(os.environ["RANK"])
    atexit.register(lambda: (folder / f"{number}.threads").write_text(" ".join(_threads())))  # after all other endings
    for case in cases:
        (place := folder / case).mkdir(exist_ok=True)
        found, error = tried(case, Rank(number, number == culprit, engine, place))
        (place / f"{number}.json").write_text(json.dumps(found))
        if error is not None and CASES[case] in PARTING:
            raise error


def _threads() -> list[str]:
    """The names of this process's threads, where the system tells them."""
    return sorted(task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm"))


def run(
    cases: Sequence[str], culprit: int, engine: str, folder: Path
) -> tuple[list[Ended], dict[str, list[Found | None]]]:
    """How both ranks end, and what they have written down of each case; one that was killed has not."""
    command = [sys.executable, "-m", "tests.runtime.ranks.matrix", str(folder), ",".join(cases), str(culprit), engine]
    ends = ends_of_ranks(command, limit=LIMIT * len(cases))
    return ends, {case: [_read(folder / case / f"{rank}.json") for rank in range(len(ends))] for case in cases}


def _read(place: Path) -> Found | None:
    return Found(*json.loads(place.read_text())) if place.exists() else None


def print_table(cases: Sequence[str], engines: Sequence[str]) -> None:
    """Every case, by the rank that goes wrong and the engine."""
    agreed = [case.__name__ for case in (*AGREED, *CALLED_ALONE) if case.__name__ in cases]
    together = [agreed] * bool(agreed) + [[case.__name__] for case in PARTING if case.__name__ in cases]
    table = Table("case", "rank", "engine", "exit codes", "seconds", "what the other rank says", show_lines=True)
    hung = 0
    for some, culprit, engine in product(together, (0, 1), engines):
        with tempfile.TemporaryDirectory() as folder:
            ends, found = run(some, culprit, engine, Path(folder))
        codes = ", ".join("hung" if end.code is None else str(end.code) for end in ends)
        hung += "hung" in codes
        for case in some:
            theirs = found[case][1 - culprit]
            if theirs is None:
                said, seconds = ends[1 - culprit].complaint[-300:], ""
            else:
                said = f"{theirs.kind}: {theirs.message}" if theirs.kind else "-"
                seconds = "" if theirs.seconds is None else f"{theirs.seconds:.1f}"
            row = (
                case,
                str(culprit),
                engine,
                "in step" if some is agreed and codes == "0, 0" else codes,
                seconds,
                said,
            )
            table.add_row(*map(escape, row))
            print(*row, sep=" | ", flush=True)
    Console(width=200).print(table)
    print(f"{table.row_count} cases, {hung} processes hung")


if __name__ == "__main__":
    if len(sys.argv) == 5:
        be_one_rank(Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), sys.argv[4])
    else:
        parser = argparse.ArgumentParser(prog="python -m tests.runtime.ranks.matrix", description=__doc__)
        parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none is named")
        parser.add_argument("--engine", choices=ENGINES, help="this one alone")
        asked = parser.parse_args()
        print_table(asked.cases or list(CASES), ENGINES if asked.engine is None else [asked.engine])
