"""A token that a configuration carries is in nothing that a run writes, logs or prints."""

import io
import logging
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
from datasets import Dataset
from rich.console import Console

from ppo_runtime import PPOConfig
from ppo_runtime import trainer as trainer_module
from ppo_runtime.common.redact import HIDDEN, hide, plain_settings, without_secrets
from ppo_runtime.loop import train
from tests.runtime.reporting.test_tracking import FakeWandb
from tests.runtime.support.sealing import seal_again
from tests.runtime.support.trainers import make_trainer

TOKEN = "hf_" + "qWxYz0123456789" * 2
SECRET = "horse-battery-staple"
SETTINGS: dict[str, Any] = {
    "push_to_hub_if_best_kwargs": {"repo_id": "me/policy", "token": TOKEN},
    "tracker_kwargs": {"wandb": {"entity": "us", "settings": {"api_key": SECRET}}},
}


def _run(tmp_path: Path, *, steps: int, **more: Any) -> Any:
    rows = Dataset.from_dict({"query": ["a"] * 6, "input_ids": [[5, 6]] * 6})
    settings = SETTINGS | {"project_kwargs": {"logging_dir": str(tmp_path)}, "ppo_epochs": 1} | more
    trainer = make_trainer(dataset=rows, **settings)
    train(
        trainer,
        lambda _, texts: [0.5] * len(texts),
        steps=steps,
        generation_kwargs={"max_new_tokens": 2},
        output_dir=tmp_path,
        checkpoint_every=1,
        resume=True,
        console=Console(file=io.StringIO()),
    )
    return trainer


def test_no_file_and_no_log_of_a_run_holds_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The upload fails with a message that holds the token; the run then goes on with another one."""
    caplog.set_level(logging.DEBUG)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def fail(*_: Any, token: str, **__: Any) -> None:
        raise RuntimeError(f"no such user: {token}")

    monkeypatch.setattr(trainer_module, "upload", fail)
    trainer = _run(tmp_path, steps=1, log_with="wandb")
    _run(
        tmp_path,
        steps=2,
        log_with="wandb",
        push_to_hub_if_best_kwargs={"repo_id": "me/policy", "token": "another-" + SECRET},
    )
    trainer.create_model_card(str(tmp_path / "card"))
    written = {path: path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()}
    assert {"run.json", "state.json", "metrics.jsonl", "README.md"} <= {path.name for path in written}
    shown = {"log": caplog.text, "tracker": str(fake.settings), "repr": repr(trainer.config)}
    for place, text in {**written, **shown}.items():
        assert TOKEN not in text, place
        if place != "tracker":
            assert SECRET not in text, place
    assert "could not be uploaded" in caplog.text
    assert "push_to_hub_if_best_kwargs was" not in caplog.text
    assert fake.settings["settings"] == {"api_key": SECRET}, "the tracker itself gets its key"
    assert TOKEN not in str(fake.settings["config"])
    assert SECRET not in str(fake.settings["config"])
    assert "me/policy" in written[tmp_path / "run.json"], "what is no secret stays"


@pytest.mark.parametrize(
    "key",
    [
        *(
            "token",
            "hf_token",
            "tokens",
            "APIToken",
            "api_key",
            "apiKey",
            "WANDB_API_KEY",
            "wandb_key",
            "api_key_value",
        ),
        *("password", "passwd", "pwd", "client_secret", "secret_key", "access_key", "private_key"),
        *("Authorization", "auth", "bearer"),
    ],
)
@pytest.mark.parametrize("secret", [SECRET, SECRET.encode(), [SECRET], {"value": (SECRET,)}], ids=str)
def test_what_is_called_a_secret_is_one(key: str, secret: Any) -> None:
    assert without_secrets({"a": [{key: secret}]}) == {"a": [{key: HIDDEN}]}


@pytest.mark.parametrize(
    "text",
    [TOKEN, "sk-" + "q1" * 12, "sk-proj-" + "q1" * 12, "ghs_" + "q1" * 12, "wandb_v1_" + "q1" * 12, "me:" + SECRET],
)
def test_what_looks_like_a_secret_is_one_wherever_it_stands(text: str) -> None:
    kept = str(without_secrets({"endpoint": f"https://{text}@host/path", "note": f"made with https://{text}@host"}))
    assert text not in kept
    assert "@host" in kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("postgres://me:pa@ss@host:5432/db", "postgres://me:{}@host:5432/db"),
        ("postgres://me:pa/ss@host/db", "postgres://me:{}@host/db"),
        ("postgres://me:pa/s:s@1@host/db?sslmode=require", "postgres://me:{}@host/db?sslmode=require"),
        ("redis://:pa#s?s@host", "redis://:{}@host"),
        ("see https://me:secret@host/a, or https://host/b@c", "see https://me:{}@host/a, or https://host/b@c"),
        ("https://me:one@host/a and https://you:two@host/b", "https://me:{}@host/a and https://you:{}@host/b"),
        ("https://host/a?token=secret&n=3", "https://host/a?token={}&n=3"),
        ("https://host/a?n=3&api_key=sec#ret&m=4", "https://host/a?n=3&api_key={}&m=4"),
        ("no answer from 'https://host/a?token=secret'.", "no answer from 'https://host/a?token={}'."),
        ("connect(password='secret', n=3)", "connect(password={}, n=3)"),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer {}"),
        ("https://host/a?X-Amz-Signature=ab12&sig=cd34", "https://host/a?X-Amz-Signature={}&sig={}"),
        ("https://host/a?access-token=se%20cret", "https://host/a?access-token={}"),
        ("host=db user=me password=secret dbname=runs", "host=db user=me password={} dbname=runs"),
        ("host=db password='my secret' dbname=runs", "host=db password={} dbname=runs"),
        (r"password='it\'s secret' user=me", "password={} user=me"),
        ('password = "my secret"', "password = {}"),
        ("Server=db;Pwd=secret;Database=runs", "Server=db;Pwd={};Database=runs"),
        ("AccountName=me;AccountKey=abc==;EndpointSuffix=x", "AccountName=me;AccountKey={};EndpointSuffix=x"),
        ("WANDB_API_KEY=secret python train.py", "WANDB_API_KEY={} python train.py"),
        ("login --token abcdef --max-tokens 5 --user me", "login --token {} --max-tokens 5 --user me"),
        ("token: abcdef123456, n: 3", "token: {}, n: 3"),
        ("clone https://tok3nvalue123@host/x", "clone https://{}@host/x"),
        ("glpat-" + "Q1" * 10 + " and xoxb-" + "12ab" * 5, "{} and {}"),
    ],
)
def test_a_password_within_a_text_is_hidden_and_the_rest_kept(text: str, kept: str) -> None:
    """In addresses with any character in it, in query strings and in the settings of a database."""
    expected = kept.replace("{}", HIDDEN)
    assert without_secrets([text]) == [expected]
    assert hide(text) == expected
    assert hide(expected) == expected, "what is hidden stays so"


@pytest.mark.parametrize(
    "text",
    [
        *("https://host:8080/a@b", "https://host/a:b@c", "http://host:80/x?mail=me@here", "git@host:me/run.git"),
        *("max_new_tokens=3", "https://host?page_token_type=a&tokens=3&pad_token=<pad>", "password=", "key=a", "a=b"),
        *("see https://host:80/a, written by me@here", "tokenizer=gpt2", "author=me;x=1"),
        *("ssh://git@host/x", "https://somebody@host", "the token: a word of twelve", "--tokens 12", "ask --token -x"),
    ],
)
def test_a_text_without_a_password_is_kept(text: str) -> None:
    assert without_secrets([text]) == [text]


def test_what_follows_an_option_in_a_command_is_hidden() -> None:
    command = ["run", "--password", SECRET, "--n", "3", "--token"]
    assert without_secrets(command) == ["run", "--password", HIDDEN, "--n", "3", "--token"]
    assert without_secrets((*command, 5)) == ("run", "--password", HIDDEN, "--n", "3", "--token", 5)


def test_a_text_is_looked_through_in_steps_of_its_length() -> None:
    """A value's last point was looked for behind each of its points."""
    for text in ("a=" + "." * 10**6 + "z", "token=" + ".)" * 10**6 + "z"):
        assert len(without_secrets(text)) <= len(text)


def test_what_says_nothing_is_kept() -> None:
    settings = {"token": None, "create_pr": True, "max_new_tokens": 3, "tokens": (1, 2), "token_type": False}
    settings |= {"tokenizer": "gpt2", "pad_token_id": 0, "note": "a risk-averse task_of_sixteen_letters", "key": "a"}
    settings |= {"url": "https://host:8080/a@b", "author": "us", "pad_token": "<pad>", "stop_tokens": ["."]}
    assert without_secrets(settings) == settings


def test_a_hub_token_is_known_by_its_looks() -> None:
    assert without_secrets({"url": f"https://user:{TOKEN}@host", "n": 1}) == {
        "url": f"https://user:{HIDDEN}@host",
        "n": 1,
    }


def test_an_object_is_named_and_not_printed() -> None:
    @attrs.frozen
    class Session:
        key: str

    assert SECRET not in str(plain_settings(PPOConfig(tracker_kwargs={"session": Session(SECRET)})))


@pytest.mark.parametrize(
    "settings",
    [
        {"accelerator_kwargs": {"token": SECRET}},
        {"project_kwargs": {"logging_dir": {"token": SECRET}}},
        {"project_kwargs": {"token": SECRET}},
        {"push_to_hub_if_best_kwargs": {"token": SECRET}},
        {"task_name": {"token": SECRET}},
    ],
)
def test_a_refusal_names_no_secret(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=name) as refusal:
        PPOConfig(**settings)
    assert SECRET not in str(refusal.value)


def test_no_dictionary_of_settings_prints_its_secrets() -> None:
    for field in attrs.fields(PPOConfig):
        if field.name.endswith("_kwargs"):
            assert callable(field.repr), field.name


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({"token": "a"}, "a bad name", "a bad name"),
        ({"token": b"horse-battery"}, "no horse-battery, no b'horse-battery'", f"no {HIDDEN}, no b'{HIDDEN}'"),
        ({"token": b"horse\xff-battery"}, r"no b'horse\xff-battery'", f"no b'{HIDDEN}'"),
        ({"token": "horse", "a": {"api_key": "horse-battery"}}, "horse-battery, horse", f"{HIDDEN}, {HIDDEN}"),
        ({"token": "", "password": b""}, "nothing", "nothing"),
    ],
)
def test_a_message_is_hidden_from_and_not_garbled(settings: Any, text: str, expected: str) -> None:
    assert hide(text, settings) == expected


def test_a_record_holds_every_field() -> None:
    config = PPOConfig(batch_size=8, project_kwargs={"logging_dir": Path("here")})
    assert plain_settings(config) == config.to_dict() | {"project_kwargs": {"logging_dir": "here"}}


def test_a_checkpoint_that_still_holds_a_token_does_not_tell_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _run(tmp_path, steps=1)
    path = tmp_path / "checkpoint-1"
    state = path / "state.json"
    assert HIDDEN in state.read_text()
    state.write_text(state.read_text().replace(HIDDEN, "once-" + SECRET))
    seal_again(path)
    _run(tmp_path, steps=2, seed=1)
    assert "seed was 0 and is 1" in caplog.text
    assert SECRET not in caplog.text
