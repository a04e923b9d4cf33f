"""The part of a trainer that samples responses."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ppo_runtime import inputs
from ppo_runtime.config import PPOConfig
from ppo_runtime.context import Context, decoder_start
from ppo_runtime.models import PreTrainedModelWrapper
from ppo_runtime.modes import dropout_off
from ppo_runtime.references import reference_context
from ppo_runtime.rollout import SamplingSpec, generate_responses

logger = logging.getLogger(__name__)


class Generating:
    """Responses from the policy, and from the reference if wanted."""

    config: PPOConfig
    model: PreTrainedModelWrapper
    ref_model: Any
    pad_token_id: int
    eos_token_ids: set[int]
    _sampling_warned: bool = False

    @property
    def device(self) -> torch.device:
        """Where the policy lives."""
        return self.model.device

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to one query or to each of a list.

        Args:
            query_tensor: token ids (length,), or a list of such tensors.
            length_sampler: gives ``max_new_tokens`` of each generated batch.
            batch_size: queries generated together.
            return_prompt: True puts the prompt in front. Only the response is ever cut at an EOS.
            generate_ref_response: also sample from the reference.
            generation_kwargs: for transformers' ``generate``. Temperature, top-k and top-p other than 1, 0 and 1
                sample from another distribution than the one PPO trains, and are warned about.

        Returns:
            For a list, a list of 1-d tensors; for one tensor, a [1, length] tensor. With ``generate_ref_response`` a
            pair of these, policy first.

        Raises:
            ValueError: an empty query, ids outside the vocabulary, or a prompt that leaves no room in the context.
        """
        single = isinstance(query_tensor, Tensor)
        queries = [query_tensor] if isinstance(query_tensor, Tensor) else query_tensor
        queries = inputs.token_rows("query_tensor", queries, vocab_size=self.model.config.vocab_size, allow_empty=False)
        new_tokens = generation_kwargs.get("max_new_tokens") or 1
        Context.of(self.model).check(
            [len(query) for query in queries],
            [new_tokens] * len(queries),
            names=("query_tensor", "query_tensor"),
            response="max_new_tokens",
        )
        prompt_width = self.config.pad_max_input_len if self.config.pad_for_acceleration else 0
        if prompt_width:
            inputs.fits_static_padding(map(len, queries), prompt_width, setting="pad_max_input_len", what="the prompt")
        self._warn_of_sampling(generation_kwargs)
        models: list[tuple[Any, AbstractContextManager[Any]]] = [(self.model, nullcontext())]
        if generate_ref_response and self.ref_model is not None:
            models.append((self.ref_model, nullcontext()))
        elif generate_ref_response:
            models.append((self.model, reference_context(self.model)))
        if self.model.is_encoder_decoder:
            # The step scores behind this token, so no other may be in force in the policy or the reference.
            generation_kwargs.setdefault("decoder_start_token_id", decoder_start(self.model))
        eos = generation_kwargs.get("eos_token_id")
        answers: list[Any] = []
        for model, context in models:
            with context, dropout_off(model):
                responses = generate_responses(
                    model,
                    [query.to(self.device) for query in queries],
                    batch_size=batch_size,
                    pad_token_id=generation_kwargs.get("pad_token_id", self.pad_token_id),
                    eos_token_ids=self.eos_token_ids if eos is None else {eos} if isinstance(eos, int) else set(eos),
                    length_sampler=length_sampler,
                    is_encoder_decoder=self.model.is_encoder_decoder,
                    generation_kwargs={k: v for k, v in generation_kwargs.items() if k != "pad_token_id"},
                    prompt_width=prompt_width,
                )
            if return_prompt and not self.model.is_encoder_decoder:
                responses = [
                    torch.cat((query.to(response.device), response))
                    for query, response in zip(queries, responses, strict=True)
                ]
            answers.append(responses[0].unsqueeze(0) if single else responses)
        return tuple(answers) if generate_ref_response else answers[0]

    def _warn_of_sampling(self, generation_kwargs: dict[str, Any]) -> None:
        spec = SamplingSpec.of(self.model.pretrained_model, generation_kwargs)
        if departures := spec.departures():
            if not self._sampling_warned:
                logger.warning(
                    "responses are sampled with %s, but PPO trains the plain distribution: the KL can then turn "
                    "negative; sample with temperature=1.0, top_k=0, top_p=1.0",
                    ", ".join(departures),
                )
            self._sampling_warned = True
