"""Uploading what a `save_pretrained` writes."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_UPLOADS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")


def upload(
    save: Callable[[str], None],
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_description: str | None = None,
    use_temp_dir: bool | None = None,
) -> Any:
    """Let ``save`` write into a temporary directory and upload that; returns huggingface_hub's commit information.

    With ``use_temp_dir=False`` the directory is one of the repository's name, and stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    stays = use_temp_dir is False
    with nullcontext(repo_id.rpartition("/")[2]) if stays else TemporaryDirectory() as folder:
        save(folder)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def take_upload(kwargs: dict[str, Any], directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Take the arguments of an upload out of those of a ``save_pretrained``; None unless ``push_to_hub`` is set.

    The repository is called as the directory unless ``repo_id`` says otherwise.
    """
    if not kwargs.pop("push_to_hub", False):
        return None
    return {"repo_id": Path(directory).resolve().name} | {key: kwargs.pop(key) for key in _UPLOADS if key in kwargs}
