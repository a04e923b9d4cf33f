"""What ``train`` is given and cannot use is answered by name, before anything is generated or written."""

import io
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, DatasetDict, Features, Value
from rich.console import Console
from torch.utils.data import Dataset as TorchDataset

from ppo_runtime import PPOConfig
from ppo_runtime.loop import train
from ppo_runtime.models.context import Context
from ppo_runtime.rollout import prompts, room
from tests.runtime.support.tiny import VOCAB_SIZE, tiny_tokenizer
from tests.runtime.support.trainers import make_trainer

IDS = [[5, 6, 7], [8], [9, 10], [11, 12]]


def _dataset(ids: Any = None, **columns: Any) -> Dataset:
    ids = IDS if ids is None else ids
    return Dataset.from_dict({"query": ["q"] * len(ids), "input_ids": ids} | columns)


def _trainer(dataset: Any, **settings: Any) -> Any:
    return make_trainer(dataset=dataset, batch_size=4, mini_batch_size=2, ppo_epochs=1, **settings)


def _train(trainer: Any, score_fn: Any = None, **options: Any) -> Any:
    return train(
        trainer,
        score_fn or (lambda _, texts: [0.1 * index for index in range(len(texts))]),
        **({"steps": 1, "generation_kwargs": {"max_new_tokens": 3}, "console": Console(file=io.StringIO())} | options),
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where metrics go when nothing says otherwise."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _refused(call: Callable[[], Any], trainer: Any, message: str, home: Path) -> None:
    """The call is refused by name; the trainer never generated, and no file was left."""
    generated = []
    trainer.generate = lambda *_, **__: generated.append(1)
    with pytest.raises((ValueError, TypeError), match=message):
        call()
    assert not generated
    assert not [path for path in home.rglob("*") if path.is_file() and path.name != "a-file"]
    assert trainer.current_step == 0


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": ({"steps": 0}, "steps is 0, expected an integer of at least 1 or None"),
    "half steps": ({"steps": 2.5}, "steps is 2.5, expected an integer"),
    "steps as text": ({"steps": "3"}, "steps is '3', expected an integer"),
    "steps as a flag": ({"steps": True}, "steps is True, expected an integer"),
    "steps not a number": ({"steps": float("nan")}, "steps is nan, expected an integer"),
    "checkpoint_every 0": ({"checkpoint_every": 0, "output_dir": "o"}, "checkpoint_every is 0, expected an integer"),
    "checkpoint_every -1": ({"checkpoint_every": -1, "output_dir": "o"}, "checkpoint_every is -1, expected"),
    "checkpoint_every half": ({"checkpoint_every": 0.5, "output_dir": "o"}, "checkpoint_every is 0.5, expected"),
    "checkpoints nowhere": ({"checkpoint_every": 2}, "checkpoint_every is 2 and output_dir is None"),
    "no checkpoints kept": ({"keep_last": 0, "output_dir": "o"}, "keep_last is 0, expected an integer of at least 1"),
    "half of them kept": ({"keep_last": 1.5, "output_dir": "o"}, "keep_last is 1.5, expected"),
    "best ones as a number": ({"keep_best": 1, "output_dir": "o"}, "keep_best is 1, expected True or False"),
    "resume nowhere": ({"resume": True}, "resume is True and output_dir is None"),
    "resume as a path": ({"resume": "o/checkpoint", "output_dir": "o"}, "resume is 'o/checkpoint', expected True or"),
    "generation_batch_size 0": ({"generation_batch_size": 0}, "generation_batch_size is 0, expected an integer"),
    "generation_batch_size half": ({"generation_batch_size": 1.5}, "generation_batch_size is 1.5, expected"),
    "generation_kwargs a number": ({"generation_kwargs": 32}, "generation_kwargs is 32, expected a dictionary"),
    "generation_kwargs a list": ({"generation_kwargs": ["x"]}, r"generation_kwargs is \['x'\], expected a dictionary"),
    "no new tokens": ({"generation_kwargs": {"max_new_tokens": 0}}, r"generation_kwargs\['max_new_tokens'\] is 0"),
    "new tokens as text": ({"generation_kwargs": {"max_new_tokens": "8"}}, r"\['max_new_tokens'\] is '8', expected"),
    "a batch size inside": ({"generation_kwargs": {"batch_size": 2}}, "pass generation_batch_size to train"),
    "prompts inside": ({"generation_kwargs": {"return_prompt": True}}, "'return_prompt', which train decides itself"),
    "reference inside": ({"generation_kwargs": {"generate_ref_response": True}}, "'generate_ref_response', which"),
    "a sampler that is a number": ({"generation_kwargs": {"length_sampler": 4}}, r"\['length_sampler'\] is a int"),
    "too many new tokens": (
        {"generation_kwargs": {"max_new_tokens": 62}},
        r"dataset\[0\]\['input_ids'\] has 3 tokens, expected at most 2, .* generate fewer tokens",
    ),
    "output_dir empty": ({"output_dir": ""}, "output_dir is '', expected the path of a directory or None"),
    "output_dir a number": ({"output_dir": 3}, "output_dir is 3, expected the path of a directory"),
    "output_dir of other bytes": ({"output_dir": "o\udcff"}, r"output_dir is 'o.udcff', expected a name in UTF-8"),
    "output_dir a file": (
        {"output_dir": "a-file"},
        "output_dir is '.*/a-file', expected a directory that can be written",
    ),
    "output_dir below a file": (
        {"output_dir": "a-file/o"},
        "output_dir is '.*/a-file/o', expected",
    ),
    "a console of text": ({"console": "stderr"}, "console is a str, expected a rich.console.Console"),
    "no score function": ({"score_fn": 5}, "score_fn is a int, expected a function from prompts and responses"),
    "scores, not a function": ({"score_fn": [0.5] * 4}, "score_fn is a list, expected a function"),
    "a score function of texts": ({"score_fn": lambda texts: 0}, "score_fn takes .texts., expected two arguments"),
    "a score function of three": ({"score_fn": lambda a, b, c: 0}, "score_fn takes .a, b, c., expected two arguments"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_argument_is_refused_by_name(case: str, home: Path) -> None:
    (home / "a-file").touch()
    options, message = ARGUMENTS[case]
    trainer = _trainer(_dataset())
    _refused(lambda: _train(trainer, **options), trainer, message, home)


class Unstorable:
    """A scheduler of the user's own, and what it gives as its state."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def step(self) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Whatever it was made with."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.state = state


def _with_scheduler(trainer: Any, scheduler: Any) -> None:
    trainer.lr_scheduler = scheduler


def _with_option(trainer: Any, option: Any) -> None:
    trainer.optimizer.param_groups[0]["note"] = option


UNSTORABLE: dict[str, tuple[Callable[[Any], None], str]] = {
    "scheduler": (lambda t: _with_scheduler(t, Unstorable(a=[object()])), r"lr_scheduler\.a\.0 is a object, expected"),
    "scheduler without a state": (lambda t: _with_scheduler(t, SimpleNamespace(step=int)), "without state_dict"),
    "optimiser": (lambda t: _with_option(t, object()), r"optimizer\.param_groups\.0\.note is a object, expected"),
    "coefficient": (lambda t: setattr(t.kl_ctl, "value", Decimal("0.2")), "kl_coef is a Decimal, expected"),
}


@pytest.mark.parametrize("case", UNSTORABLE)
def test_what_no_checkpoint_could_hold_is_refused_before_there_is_one_to_make(case: str, home: Path) -> None:
    spoil, message = UNSTORABLE[case]
    trainer = _trainer(_dataset())
    if case == "coefficient":
        trainer.kl_ctl = SimpleNamespace(value=0.2, update=lambda *_: None)
    spoil(trainer)
    _refused(lambda: _train(trainer, output_dir="o"), trainer, message, home)


@pytest.mark.parametrize(
    ("lies_there", "message"),
    [
        ("checkpoint-1/notes.txt", r"checkpoint-1 holds notes.txt, and so is not a checkpoint alone.*; move it, or"),
        ("checkpoint-1", "checkpoint-1 is a file, expected the directory of a checkpoint"),
        ("model", "model is a file, expected a directory for the policy"),
        ("model-broken-off", "model-broken-off is a file, expected a directory for the policy"),
        ("run.json/notes.txt", "run.json is a directory, expected a file for the run's record"),
    ],
)
@pytest.mark.parametrize("resume", [True, False])
def test_what_the_run_would_write_over_is_found_first(lies_there: str, message: str, resume: bool, home: Path) -> None:
    """Another's files under the names of what the run writes at its end, or after hours."""
    path = home / "o" / lies_there
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    trainer = _trainer(_dataset(), project_kwargs={"logging_dir": str(home / "logs")})
    trainer.generate = None  # it would not be able to
    with pytest.raises(ValueError, match=message):
        _train(trainer, output_dir="o", resume=resume)
    assert [file for file in home.rglob("*") if file.is_file()] == [path]
    assert path.read_text() == "precious"


def test_metrics_that_cannot_be_written_are_refused_first(home: Path) -> None:
    (home / "a-file").touch()
    trainer = _trainer(_dataset(), project_kwargs={"logging_dir": "a-file/logs"})
    _refused(
        lambda: _train(trainer), trainer, "logging_dir is '.*/a-file/logs', expected a directory that can be", home
    )


def test_a_tracker_that_is_not_installed_is_missed_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    trainer = _trainer(_dataset(), log_with="wandb")
    generated: list[int] = []
    trainer.generate = lambda *_, **__: generated.append(1)
    with pytest.raises(ImportError, match="wandb"):
        _train(trainer)
    assert not generated


@pytest.mark.parametrize("field", ["exp_name", "tracker_project_name"])
@pytest.mark.parametrize("value", [None, "", 3, Path("run")])
def test_a_run_has_a_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is {re.escape(repr(value))}, expected a text that is not empty"):
        PPOConfig(**{field: value})


@pytest.mark.parametrize("value", [3, ["x"], b"logs"])
def test_a_logging_directory_is_a_path(value: Any) -> None:
    with pytest.raises(ValueError, match=r"project_kwargs\['logging_dir'\] is .*, expected the path of a directory"):
        PPOConfig(project_kwargs={"logging_dir": value})


@pytest.mark.parametrize("value", [np.int64(2), torch.tensor(2)])
def test_whole_numbers_of_other_kinds_are_numbers(value: Any, home: Path) -> None:
    assert len(_train(_trainer(_dataset()), steps=value, generation_batch_size=value).history) == 2


# --- datasets ----------------------------------------------------------------------------------------------------

IMAGE = Features({"input_ids": Array2D((1, 2), "int64"), "query": Value("string")})
DATASETS: dict[str, tuple[Callable[[], Any], str]] = {
    "a name": (lambda: "imdb", "dataset is a str, expected rows.*load_dataset"),
    "a number": (lambda: 7, "dataset is a int, expected rows"),
    "splits": (lambda: DatasetDict(train=_dataset()), r"dataset is a DatasetDict of 'train', expected one of them"),
    "columns": (lambda: {"input_ids": IDS}, "dataset is a dict, expected rows.*Dataset.from_dict"),
    "a generator": (lambda: ({"input_ids": ids} for ids in IDS), "dataset is a generator, expected rows"),
    "nothing": (lambda: [], "dataset has no rows"),
    "an empty table": (lambda: _dataset([]), "dataset has no rows"),
    "text alone": (
        lambda: Dataset.from_dict({"text": ["a"] * 4}),
        "dataset has the columns 'text', expected 'input_ids'",
    ),
    "queries alone": (
        lambda: Dataset.from_dict({"query": ["a"] * 4}),
        "dataset has the columns 'query', expected 'input_",
    ),
    "rows of text": (lambda: ["a", "b", "c", "d"], r"dataset\[0\] is a str, expected a row with 'input_ids'"),
    "rows without ids": (lambda: [{"text": "a"}] * 4, r"dataset\[0\] has 'text', expected a row with 'input_ids'"),
    "texts for ids": (
        lambda: _dataset(["a", "b", "c", "d"]),
        r"dataset\[0\]\['input_ids'\] is the text 'a', expected token",
    ),
    "an empty prompt": (
        lambda: _dataset([[5], [6], [], [7]]),
        r"dataset\[2\]\['input_ids'\] is empty, expected at least",
    ),
    "an empty list": (lambda: [{"input_ids": i} for i in ([5], [], [6], [7])], r"dataset\[1\]\['input_ids'\] is empty"),
    "a missing prompt": (
        lambda: _dataset([[5], None, [6], [7]]),
        r"dataset\[1\]\['input_ids'\] is None, expected a list",
    ),
    "a missing token": (
        lambda: _dataset([[5], [6, None], [6], [7]]),
        r"dataset\[1\]\['input_ids'\] is \[6, None\], expected",
    ),
    "fractions": (lambda: _dataset([[0.5], [1.5], [1.0], [2.0]]), r"\[0\]\['input_ids'\] has dtype torch.float32"),
    "a batch axis": (lambda: _dataset([[[5, 6]]] * 4), r"\[0\]\['input_ids'\] has shape \(1, 2\), expected 1-d"),
    "a fixed shape": (
        lambda: Dataset.from_dict({"input_ids": [[[5, 6]]] * 4, "query": ["q"] * 4}, features=IMAGE),
        r"\[0\]\['input_ids'\] has shape \(1, 2\), expected 1-d",
    ),
    "another vocabulary": (
        lambda: _dataset([[5], [6], [7], [VOCAB_SIZE]]),
        r"dataset\[3\]\['input_ids'\] holds token id",
    ),
    "below the vocabulary": (lambda: _dataset([[5], [-1], [7], [6]]), r"dataset\[1\]\['input_ids'\] holds token id -1"),
    "a prompt without room": (
        lambda: _dataset([[5], [6] * 62, [7], [6]]),
        r"dataset\[1\]\['input_ids'\] has 62 tokens",
    ),
    "scalars": (lambda: _dataset([5, 6, 7, 8]), r"dataset\[0\]\['input_ids'\] has shape \(\), expected 1-d"),
    "nothing but padding": (
        lambda: _dataset([[5, 6]] * 4, attention_mask=[[1, 1], [1, 0], [0, 0], [1, 1]]),
        r"dataset\[2\]\['input_ids'\] is empty, expected at least",
    ),
    "a mask that is shorter": (
        lambda: _dataset([[5, 6]] * 4, attention_mask=[[1, 1], [1], [1, 1], [1, 1]]),
        r"dataset\[1\]\['input_ids'\] has shape \(2,\), and its attention_mask \(1,\)",
    ),
    "masks that are longer and shorter": (
        lambda: _dataset([[5, 6]] * 4, attention_mask=[[1, 1], [1], [1, 1, 1], [1, 1]]),
        r"dataset\[1\]\['input_ids'\] has shape \(2,\), and its attention_mask \(1,\)",
    ),
    "a mask with a hole in it": (
        lambda: _dataset([[5, 6]] * 4, attention_mask=[[1, 1], [1, None], [1, 1], [1, 1]]),
        r"dataset\[1\]\['attention_mask'\] is \[1, None\], expected",
    ),
    "a mask of texts": (
        lambda: _dataset([[5, 6]] * 4, attention_mask=["11"] * 4),
        r"dataset\[0\]\['attention_mask'\] is '11', expected",
    ),
    "a token behind no mask": (
        lambda: _dataset([[5, VOCAB_SIZE]] * 4, attention_mask=[[1, 0], [1, 0], [1, 1], [1, 0]]),
        r"dataset\[2\]\['input_ids'\] holds token id",
    ),
    "padding without room behind it": (
        lambda: _dataset([[0] * 9 + [5] * 62] * 4, attention_mask=[[0] * 9 + [1] * 62] * 4),
        r"dataset\[0\]\['input_ids'\] has 62 tokens",
    ),
}


@pytest.mark.parametrize("case", DATASETS)
def test_a_dataset_is_refused_by_row_or_kind(case: str, home: Path) -> None:
    make, message = DATASETS[case]
    trainer = _trainer(_dataset(), drop_last=False, remove_unused_columns=False)

    def use() -> None:
        trainer.dataloader = trainer.prepare_dataloader(make())
        _train(trainer)

    _refused(use, trainer, message, home)


def test_a_bad_row_far_down_is_found_first(home: Path) -> None:
    """In a view of a table, too, whose rows are not where the table has them."""
    rows = _dataset([[5]] * 2500 + [[VOCAB_SIZE]]).select(range(2500, -1, -1)).select(range(2500))
    trainer = _trainer(rows)
    _refused(lambda: _train(trainer), trainer, r"dataset\[0\]\['input_ids'\] holds token id", home)
    assert len(_train(_trainer(rows.select(range(1, 2500)))).history) == 1


class Rows(TorchDataset):
    """A torch dataset: its rows are looked at when their batch comes."""

    def __init__(self, *rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


BATCHES: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], "the dataloader gave a list, expected a dictionary with 'input_ids'"),
    "a tensor": (torch.ones(4, 2), "the dataloader gave a Tensor, expected a dictionary"),
    "no ids": ({"text": ["a"] * 4}, "the batch has 'text', expected 'input_ids'"),
    "no rows": ({"input_ids": None}, r"batch\['input_ids'\] is a NoneType, expected one list of tokens per row"),
    "a text": ({"input_ids": "abc"}, r"batch\['input_ids'\] is a str, expected one list"),
    "texts": ({"input_ids": ["a", "b", "c", "d"]}, r"batch\['input_ids'\]\[0\] is the text 'a'"),
    "an empty prompt": (
        {"input_ids": [[5], [], [6], [7]]},
        r"batch\['input_ids'\]\[1\] is empty, expected at least one",
    ),
    "fractions": ({"input_ids": torch.rand(4, 2)}, r"batch\['input_ids'\]\[0\] has dtype torch.float32"),
    "too few": ({"input_ids": [[5]] * 3}, "has 3 rows, expected batch_size = 4"),
    "too many": ({"input_ids": [[5]] * 5}, "has 5 rows, expected batch_size = 4"),
    "too few queries": ({"input_ids": IDS, "query": ["q"]}, r"batch\['query'\] has 1 entries, expected 4 texts"),
    "one query": ({"input_ids": IDS, "query": "four"}, r"batch\['query'\] has .*, expected 4 texts"),
    "a number of queries": ({"input_ids": IDS, "query": 4}, r"batch\['query'\] has a int, expected 4 texts"),
    "too few masks": ({"input_ids": IDS, "attention_mask": [[1]]}, r"batch\['attention_mask'\] has 1 rows, expected 4"),
    "short masks": ({"input_ids": IDS, "attention_mask": [[1]] * 4}, r"\[0\] has shape \(3,\), and its attention_mask"),
    "only padding": (
        {"input_ids": [[0, 0]] * 4, "attention_mask": [[0, 0]] * 4},
        r"batch\['input_ids'\]\[0\] is empty, expected",
    ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_is_refused_before_it_is_answered(case: str, home: Path) -> None:
    batch, message = BATCHES[case]
    trainer = _trainer(_dataset())
    trainer.dataloader = trainer.prepare_dataloader(_dataset(), lambda rows: batch)
    generated: list[int] = []
    trainer.generate = lambda *_, **__: generated.append(1)
    with pytest.raises(ValueError, match=message):
        _train(trainer)
    assert not generated


@pytest.mark.parametrize("row", [{"input_ids": []}, {"text": "a"}, {"input_ids": "abc"}])
def test_a_row_of_a_torch_dataset_is_refused_with_its_batch(row: Any, home: Path) -> None:
    with pytest.raises(ValueError, match="input_ids"):
        _train(_trainer(Rows(*[row] * 4)))


@pytest.mark.parametrize("collator", [None, 3, "padding"])
def test_a_collator_is_a_function(collator: Any) -> None:
    trainer = _trainer(_dataset())
    if collator is None:
        assert len(trainer.prepare_dataloader(_dataset(), collator)) == 1
        return
    with pytest.raises(TypeError, match=f"data_collator is a {type(collator).__name__}, expected a function"):
        trainer.prepare_dataloader(_dataset(), collator)


@pytest.mark.parametrize("padded_by", ["collator", "dataset"])
def test_padding_of_a_prompt_is_no_part_of_it(padded_by: str, home: Path) -> None:
    """A collator of transformers pads prompts into one tensor, and many a dataset was tokenised with padding."""
    from transformers import DataCollatorWithPadding

    seen: list[list[int]] = []
    plain = _dataset()
    if padded_by == "collator":
        trainer = _trainer(plain)
        trainer.dataloader = trainer.prepare_dataloader(
            plain.remove_columns("query"), DataCollatorWithPadding(tiny_tokenizer())
        )
    else:
        padded = tiny_tokenizer().pad({"input_ids": IDS}, padding="max_length", max_length=60)
        trainer = _trainer(_dataset(padded["input_ids"], attention_mask=padded["attention_mask"]))
    step = trainer.step
    trainer.step = lambda queries, *rest: (seen.extend(query.tolist() for query in queries), step(queries, *rest))[1]
    _train(trainer)
    assert sorted(seen) == sorted(IDS)


@pytest.mark.parametrize("mask", [[1, 1, 0], [True, True, False], [1.0, 1.0, 0.0]], ids=str)
def test_a_padded_table_is_cleared_without_looking_at_its_rows(
    mask: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a mask takes off may be any number, in rows of any length."""
    rows = _dataset([[5, 6, VOCAB_SIZE], [-1, 7, VOCAB_SIZE + 1]], attention_mask=[mask, [mask[2], mask[0], mask[2]]])
    monkeypatch.setattr(prompts, "_prompt", None)
    prompts.check_dataset(rows, vocab_size=VOCAB_SIZE, room=room.Room(2))


@pytest.mark.parametrize("mask", [[1, 1], None], ids=str)
def test_a_row_without_a_mask_is_a_row_without_padding(mask: Any) -> None:
    rows = _dataset([[5, 6], [7]], attention_mask=[mask, None])
    prompts.check_dataset(rows, vocab_size=VOCAB_SIZE, room=room.Room(2))


# --- score functions ---------------------------------------------------------------------------------------------


def _generator(count: int) -> Iterator[float]:
    return (0.5 for _ in range(count))


TAKEN: dict[str, Callable[[int], Any]] = {
    "numbers": lambda n: [1, 0.5] * (n // 2),
    "decimals": lambda n: [Decimal("0.5")] * n,
    "a tuple": lambda n: (0.5,) * n,
    "truth values": lambda n: [True, False] * (n // 2),
    "a tensor": lambda n: torch.linspace(0, 1, n),
    "a tensor with gradient": lambda n: torch.linspace(0, 1, n, requires_grad=True),
    "a column": lambda n: torch.linspace(0, 1, n)[:, None],
    "half precision": lambda n: torch.ones(n, dtype=torch.bfloat16),
    "an array": lambda n: np.linspace(0, 1, n),
    "numpy numbers": lambda n: list(np.linspace(0, 1, n, dtype=np.float32)),
    "numpy truth values": lambda n: list(np.ones(n, dtype=bool)),
    "tensors": lambda n: [torch.tensor(0.5)] * n,
    "tensors of one entry": lambda n: [torch.tensor([[0.5]])] * n,
    "a generator": _generator,
}


class Unwilling:
    """What has a number's method and no number."""

    def __float__(self) -> float:
        raise RuntimeError("not me")


REFUSED_SCORES: dict[str, tuple[Callable[[int], Any], str]] = {
    "nothing": (lambda n: None, "score_fn returned None, expected 4 numbers.*does it return its scores"),
    "one number": (lambda n: 0.5, r"score_fn returned 0.5 \(float\), expected 4 numbers"),
    "one tensor": (lambda n: torch.tensor(0.5), r"score_fn returned tensor\(0.5000\) \(Tensor\), expected 4 numbers"),
    "a text": (lambda n: "good", r"score_fn returned 'good' \(str\), expected 4 numbers"),
    "a dictionary": (lambda n: dict.fromkeys(range(n), 0.5), r"score_fn returned \{.* \(dict\), expected 4 numbers"),
    "a set": (lambda n: {0.1, 0.2, 0.3, 0.4}, r"score_fn returned \{.* \(set\), expected 4 numbers"),
    "too few": (lambda n: [0.5] * (n - 1), "score_fn returned 3 scores, expected 4 numbers"),
    "too many": (lambda n: [0.5] * (n + 1), "score_fn returned 5 scores, expected 4 numbers"),
    "none at all": (lambda n: [], "score_fn returned 0 scores, expected 4 numbers"),
    "a row": (lambda n: torch.ones(1, n), r"score_fn returned 1 scores in shape \(1, 4\), expected 4 numbers"),
    "logits": (lambda n: torch.ones(n, 2), r"score_fn returned an entry 0 of shape \(2,\), expected one number"),
    "tensors of two": (lambda n: [torch.ones(2)] * n, r"score_fn returned an entry 0 of shape \(2,\)"),
    "arrays of two": (lambda n: [np.ones(2)] * n, r"score_fn returned an entry 0 of shape \(2,\)"),
    "texts": (lambda n: ["0.5"] * n, r"score_fn returned '0.5' \(str\) as entry 0, expected a number"),
    "pipeline output": (lambda n: [{"score": 0.5}] * n, r"score_fn returned \{'score': 0.5\} \(dict\) as entry 0"),
    "lists": (lambda n: [[0.5]] * n, r"score_fn returned \[0.5\] \(list\) as entry 0"),
    "nothing for one": (lambda n: [0.5, None, 0.5, 0.5], r"score_fn returned None as entry 1, expected a number"),
    "a tensor without numbers": (
        lambda n: torch.ones(n, device="meta"),
        "what score_fn returned is on the meta device, where tensors hold no numbers",
    ),
    "entries without numbers": (
        lambda n: [0.5] * (n - 1) + [torch.ones((), device="meta")],
        "entry 3 of what score_fn returned is on the meta device",
    ),
    "a signalling nan": (
        lambda n: [0.5, Decimal("sNaN")] * 2,
        r"score_fn returned Decimal\('sNaN'\) \(Decimal\) as entry 1, expected a number",
    ),
    "a sparse tensor": (lambda n: torch.ones(n).to_sparse(), "what score_fn returned has layout torch.sparse_coo"),
    "a number that raises": (lambda n: [Unwilling()] * n, r"\(Unwilling\) as entry 0, expected a number: not me"),
    "complex": (lambda n: [1j] * n, r"score_fn returned 1j \(complex\) as entry 0"),
    "nan": (lambda n: [0.5, float("nan"), 0.5, 0.5], r"scores\[1\] is nan, expected a finite number"),
    "infinity": (lambda n: [float("inf")] * n, r"scores\[0\] is inf, expected a finite number"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_scores_of_any_numeric_kind_are_taken(case: str, home: Path) -> None:
    assert len(_train(_trainer(_dataset()), lambda _, texts: TAKEN[case](len(texts))).history) == 1


@pytest.mark.parametrize("case", REFUSED_SCORES)
def test_scores_of_another_kind_are_refused_and_nothing_is_trained(case: str, home: Path) -> None:
    make, message = REFUSED_SCORES[case]
    trainer = _trainer(_dataset())
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(ValueError, match=message):
        _train(trainer, lambda _, texts: make(len(texts)))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.current_step == 0


def test_what_the_score_function_raises_is_its_own(home: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _train(_trainer(_dataset()), lambda *_: 1 / 0)


@pytest.mark.parametrize("number", [10**400, 1e300], ids=["an integer", "a float"])
def test_a_score_that_is_too_large_is_named_as_it_was_returned(number: Any, home: Path) -> None:
    with pytest.raises(ValueError, match=r"308 digits as entry 0|scores\[0\] is 1e\+300, expected"):
        _train(_trainer(_dataset()), lambda _, texts: [number] * len(texts))


def test_a_score_function_that_changes_its_lists_changes_no_log(home: Path) -> None:
    def careless(prompts: list[str], texts: list[str]) -> list[float]:
        count = len(texts)
        prompts.clear()
        texts.clear()
        return [0.5] * count

    trainer = _trainer(_dataset())
    logged: list[Any] = []
    trainer.log_stats = lambda _, batch, __: logged.append(batch)
    _train(trainer, careless)
    assert [len(column) for column in logged[0].values()] == [4, 4]


# --- room --------------------------------------------------------------------------------------------------------

STATIC = {"pad_for_acceleration": True, "pad_max_len": 8}
NO_ROOM: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "more than the context": ({}, {"max_new_tokens": 100}, r"\['max_new_tokens'\] is 100, expected at most 63"),
    "all of the context": ({}, {"max_new_tokens": 64}, r"\['max_new_tokens'\] is 64, expected at most 63"),
    "more than the padding": (STATIC, {"max_new_tokens": 8}, r"is 8, expected at most 7: a row of pad_max_len"),
    "a prompt beyond the padding": (STATIC, {"max_new_tokens": 6}, r"dataset\[0\].*has 3 tokens.*most 2.*pad_max_len"),
    "a prompt beyond its padding": (
        STATIC | {"pad_max_input_len": 2},
        {"max_new_tokens": 3},
        r"dataset\[0\].*has 3 tokens, expected at most 2, so that it fits into pad_max_input_len",
    ),
    "a prompt beyond max_length": (
        {},
        {"max_length": 3},
        r"dataset\[0\].*has 3 tokens, expected at most 2.*max_length",
    ),
}


@pytest.mark.parametrize("case", NO_ROOM)
def test_a_response_without_room_is_refused_first(case: str, home: Path) -> None:
    settings, asked, message = NO_ROOM[case]
    trainer = _trainer(_dataset(), **settings)
    _refused(lambda: _train(trainer, generation_kwargs=asked), trainer, message, home)


@pytest.mark.parametrize("asked", [{"max_new_tokens": 5}, {"length_sampler": lambda: 2}])
def test_what_just_fits_is_taken(asked: dict[str, Any], home: Path) -> None:
    assert len(_train(_trainer(_dataset(), **STATIC), generation_kwargs=asked).history) == 1


def test_a_prompt_and_a_response_of_an_encoder_decoder_have_room_each(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt as long as the encoder's context is no prompt without room."""
    for apart, limits, most in (
        (False, Context(row=64), 61),
        (True, Context(prompt=64, response=3), 64),
        (False, Context(), None),
    ):
        monkeypatch.setattr(Context, "of", lambda _, limits=limits: limits)
        monkeypatch.setattr(room, "has_encoder", lambda _, apart=apart: apart)
        assert room.prompt_room(_trainer(_dataset()), {"max_new_tokens": 3}).tokens == most


def test_rows_made_when_they_are_read_are_taken(home: Path) -> None:
    """A transform that tokenises, and draws random numbers, is run for batches alone."""
    calls: list[int] = []

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        calls.append(len(batch["text"]))
        torch.rand(1)
        return {"input_ids": [[5, 6]] * len(batch["text"]), "query": batch["text"]}

    rows = Dataset.from_dict({"text": ["a"] * 8}).with_transform(tokenise)
    assert len(_train(_trainer(rows), steps=2, output_dir=home / "o", checkpoint_every=1).history) == 2
    assert sum(calls) == 8


def test_rows_with_other_columns_are_named(home: Path) -> None:
    rows = [{"input_ids": [5], "query": "a"}] * 3 + [{"input_ids": [5]}]
    with pytest.raises(ValueError, match=r"row \d of the batch has no 'query', expected the columns of the other rows"):
        _train(_trainer(rows))
