"""Uploading what a `save_pretrained` writes."""

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any


def upload(
    save: Callable[[str], None],
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Let ``save`` write into a temporary directory and upload that; returns huggingface_hub's commit information."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        save(folder)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
