"""What comes from a hub and goes there: absence and failure told apart, whole uploads, older loading arguments."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import transformers
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM
from transformers.utils import hub as transformers_hub

from ppo_runtime import AutoModelForCausalLMWithValueHead
from ppo_runtime.models import loading
from ppo_runtime.models.value_head import HEAD_FILE, find_file
from tests.runtime.support.tiny import tiny_model
from tests.runtime.support.trainers import make_trainer

RESPONSE = httpx.Response(503, request=httpx.Request("GET", "https://hub"))
FAILURES: dict[str, Exception] = {
    "no connection": LocalEntryNotFoundError("no connection, and not in the cache"),
    "an answer of the server": HfHubHTTPError("503", response=RESPONSE),
    "a gated repository": GatedRepoError("gated", response=RESPONSE),
    "no such repository": RepositoryNotFoundError("404", response=RESPONSE),
    "no such revision": RevisionNotFoundError("404", response=RESPONSE),
    "a cache that may not be written": PermissionError(13, "denied", "/cache"),
}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub that fails as it is told to, as seen by a process that is not offline; nothing goes over the network."""

    def fail_with(error: Exception) -> None:
        def download(*_: Any, **__: Any) -> str:
            raise error

        monkeypatch.setattr(transformers_hub, "hf_hub_download", download)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return fail_with


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("file", [HEAD_FILE, "adapter_config.json", "model.safetensors"])
def test_a_failure_is_not_taken_for_absence(failure: str, file: str, online: Any, tmp_path: Path) -> None:
    online(FAILURES[failure])
    with pytest.raises(OSError, match=rf"whether 'someone/policy' holds {file}: (?s:.*)local_files_only=True"):
        find_file("someone/policy", file, cache_dir=tmp_path)


def test_a_policy_does_not_come_with_a_new_head_because_a_connection_failed(online: Any, tmp_path: Path) -> None:
    online(FAILURES["no connection"])
    with pytest.raises(OSError, match=rf"whether 'someone/policy' holds {HEAD_FILE}"):
        AutoModelForCausalLMWithValueHead.from_pretrained("someone/policy", cache_dir=tmp_path)


def test_absence_is_absence(online: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online(EntryNotFoundError("404"))
    assert find_file("someone/policy", HEAD_FILE, cache_dir=tmp_path) is None
    assert find_file(tmp_path, HEAD_FILE) is None
    # Noted as absent when there was a connection.
    online(FAILURES["no connection"])
    repository = tmp_path / "models--someone--policy"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / ".no_exist" / "c0ffee").mkdir(parents=True)
    (repository / ".no_exist" / "c0ffee" / HEAD_FILE).touch()
    assert find_file("someone/policy", HEAD_FILE, cache_dir=tmp_path) is None
    with pytest.raises(OSError, match="could not find out"):
        find_file("someone/policy", HEAD_FILE, cache_dir=tmp_path, subfolder="other")
    # Told to be offline, the cache is all there is.
    assert find_file("someone/policy", "adapter_config.json", cache_dir=tmp_path, local_files_only=True) is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_file("someone/policy", "adapter_config.json", cache_dir=tmp_path) is None


# --- uploads -----------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What was uploaded, in a working directory of its own."""
    found: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: Any) -> None:
            self.token = token

        def create_repo(self, repo_id: str, *, private: Any, **_: Any) -> Any:
            self.private = private
            return type("Url", (), {"repo_id": repo_id if "/" in repo_id else f"someone/{repo_id}"})

        def upload_folder(self, folder_path: str, **kwargs: Any) -> str:
            files = {file.name for file in Path(folder_path).iterdir()}
            found.append(kwargs | {"files": files, "token": self.token, "private": self.private})
            return "done"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.chdir(tmp_path)
    return found


MODEL_FILES = {"model.safetensors", HEAD_FILE, "config.json"}


@pytest.mark.parametrize(("whose", "files"), [("model", MODEL_FILES), ("trainer", MODEL_FILES | {"tokenizer.json"})])
def test_uploads_are_whole(whose: str, files: set[str], uploads: list[dict[str, Any]], tmp_path: Path) -> None:
    trainer = make_trainer()
    door: Any = trainer.model if whose == "model" else trainer
    assert door.push_to_hub("policy", token="secret", private=True, commit_description="long") == "done"
    assert not [*tmp_path.iterdir()], "written to a temporary directory"
    assert door.push_to_hub("me/kept", use_temp_dir=False) == "done"
    assert files <= {file.name for file in (tmp_path / "kept").iterdir()}
    assert door.push_to_hub("me/gone", use_temp_dir=True, commit_message="third") == "done"
    door.save_pretrained(tmp_path / "saved", push_to_hub=True, commit_message="fourth", token="other")
    assert files <= {file.name for file in (tmp_path / "saved").iterdir()}
    door.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/named")
    door.save_pretrained(tmp_path / "quiet", push_to_hub=False)
    assert [upload["repo_id"] for upload in uploads] == [
        "someone/policy",
        "me/kept",
        "me/gone",
        "someone/saved",
        "me/named",
    ]
    assert all(files <= upload["files"] for upload in uploads)
    assert (uploads[0]["token"], uploads[0]["private"], uploads[0]["commit_description"]) == ("secret", True, "long")
    assert [upload["commit_message"] for upload in uploads[2:4]] == ["third", "fourth"]
    assert uploads[3]["token"] == "other"


# --- loading arguments of old scripts ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["load_in_8bit", "load_in_4bit"])
def test_quantisation_is_asked_for_by_its_older_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    loaded: list[dict[str, Any]] = []

    def record(_: Any, **kwargs: Any) -> Any:
        loaded.append(kwargs)
        return tiny_model("llama")

    class Quantisation(dict[str, Any]):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    monkeypatch.setattr(loading, "BitsAndBytesConfig", Quantisation)
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    load(tmp_path, **{name: True}, device_map={"": 0})
    load(tmp_path, **{name: False})
    assert loaded[0] == {"quantization_config": {name: True}, "device_map": {"": 0}}
    assert loaded[1].keys() == {"dtype"}
    with pytest.raises(ValueError, match=rf"got {name} and quantization_config.*pass one of them"):
        load(tmp_path, **{name: True}, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match="got load_in_8bit and load_in_4bit"):
        load(tmp_path, load_in_8bit=True, load_in_4bit=True)

    def missing(**_: Any) -> None:
        raise PackageNotFoundError("bitsandbytes")

    monkeypatch.setattr(loading, "BitsAndBytesConfig", missing)
    with pytest.raises(ImportError, match=f"{name} needs the bitsandbytes package"):
        load(tmp_path, **{name: True})


def test_the_configuration_is_transformers_own() -> None:
    assert loading._with_quantization({"load_in_8bit": True})["quantization_config"].load_in_8bit


@pytest.mark.parametrize(
    "arguments", [{"trust_remote_code": True}, {"token": "secret", "revision": "main"}, {"trust_remote_code": False}]
)
def test_a_loaded_model_takes_what_says_where_files_come_from(arguments: dict[str, Any]) -> None:
    model = tiny_model("llama")
    assert AutoModelForCausalLMWithValueHead.from_pretrained(model, **arguments).pretrained_model is model
