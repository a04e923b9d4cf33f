"""What leaves the trainer: directories, model cards and uploads."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_runtime.config import PPOConfig
from ppo_runtime.distributed import World, global_moments
from ppo_runtime.hub import take_upload, upload
from ppo_runtime.inner import has_encoder
from ppo_runtime.model_card import is_ours, write_model_card
from ppo_runtime.models import PreTrainedModelWrapper
from ppo_runtime.redact import hide

logger = logging.getLogger(__name__)

DEFAULT_NAME = "PPO model"


class Publishing:
    """The part of a trainer that saves and uploads its policy."""

    config: PPOConfig
    model: PreTrainedModelWrapper
    tokenizer: Any
    world: World
    current_step: int
    best_score: float | None
    """Highest mean raw score of an uploaded batch so far; only looked at with ``push_to_hub_if_best_kwargs``."""
    broken_off: str | None
    """What broke the last step off while it was moving the weights; None after a whole step."""

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write policy, value head, tokenizer and model card; ``transformers`` loads the directory as a plain model.

        A README.md that somebody else wrote there is kept. Only rank 0 writes. ``push_to_hub=True`` uploads the same
        afterwards, to ``repo_id`` or else a repository of the directory's name, with the arguments of ``push_to_hub``.
        """
        if self.world.rank != 0:
            return
        if (uploading := take_upload(kwargs, save_directory)) is not None:
            self.save_pretrained(save_directory, **kwargs)
            self.push_to_hub(**uploading)
            return
        card_is_free = is_ours(save_directory)
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)
        if card_is_free:
            self.create_model_card(str(save_directory), Path(save_directory).name or DEFAULT_NAME)

    def create_model_card(self, path: str, model_name: str | None = DEFAULT_NAME) -> None:
        """Write ``path``/README.md: what the model is, how it was trained and how to load it. Needs no network."""
        if self.world.rank == 0:
            write_model_card(
                path,
                model_name or DEFAULT_NAME,
                config=self.config,
                base_model=getattr(self.model.config, "name_or_path", None),
                is_encoder_decoder=has_encoder(self.model),
                steps=self.current_step,
                broken_off=self.broken_off,
            )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload what ``save_pretrained`` writes, from rank 0.

        Args:
            repo_id: of the repository; made if it does not exist.
            kwargs: ``commit_message``, ``commit_description``, ``private``, ``token``, ``revision``, ``create_pr`` and
                ``use_temp_dir``.

        Returns:
            huggingface_hub's commit information; None on other ranks.
        """
        if self.world.rank != 0:
            return None
        message = kwargs.pop("commit_message", f"Policy after {self.current_step} PPO steps")
        return upload(self.save_pretrained, repo_id, commit_message=message, **kwargs)

    def _push_if_best(self, raw_scores: Tensor) -> None:
        """Upload the policy that made this batch, if its mean *raw* score is the highest that was compared so far.

        To be called before the update. Scaled scores would not do: their scale moves with the run. An upload that
        fails is a warning, and is tried again with the next best batch: training is worth more.
        """
        if not self.config.push_to_hub_if_best_kwargs or self.current_step % self.config.compare_steps:
            return
        mean = float(global_moments(raw_scores, torch.ones_like(raw_scores, dtype=torch.bool), self.world).mean)
        if self.best_score is not None and mean <= self.best_score:
            return
        kwargs = self.config.push_to_hub_if_best_kwargs
        try:
            self.push_to_hub(**kwargs)
        except Exception as error:  # whatever network, hub and disk can come up with
            logger.warning(
                "the best policy so far (mean score %.4g) could not be uploaded: %s", mean, hide(str(error), kwargs)
            )
            return
        self.best_score = mean
