"""Responses to queries: settings checked and warned about, and what a trainer remembers of its latest responses."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any

import attrs
import torch
from torch import Tensor

from ppo_runtime.accel.onednn import rollout_layers
from ppo_runtime.common import inputs
from ppo_runtime.common.launcher import speaks_for_all
from ppo_runtime.common.transfers import together
from ppo_runtime.config import PPOConfig
from ppo_runtime.models.context import decoder_start
from ppo_runtime.models.heads import reads_padding
from ppo_runtime.models.inner import has_encoder, transformers_model
from ppo_runtime.models.modes import dropout_off
from ppo_runtime.models.precision import computing
from ppo_runtime.models.references import reference_context
from ppo_runtime.models.wrapper import PreTrainedModelWrapper
from ppo_runtime.rollout.batching import by_length, rows_together
from ppo_runtime.rollout.drawn import Drawn
from ppo_runtime.rollout.ending import criteria_of
from ppo_runtime.rollout.engine import Engine
from ppo_runtime.rollout.lengths import check_sampler, have_room, longest_response, most_tokens
from ppo_runtime.rollout.plan import Plan
from ppo_runtime.rollout.sampling import NEUTRAL, departures, gaps
from ppo_runtime.rollout.settings import Settings, check_settings
from ppo_runtime.rollout.values import COUNT, token_ids, whole

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())

# Queries that share a drawn length where nobody says how many are generated together: TRL's batch.
_SHARING = 4
# Functions of the caller's that see which rows are generated together, or are told their places.
_SEEING_ROWS = ("prefix_allowed_tokens_fn", "logits_processor", "stopping_criteria")


@attrs.define
class Remembered:
    """What is kept from one call to the next."""

    drawn: Drawn = attrs.field(factory=Drawn)
    """The policy's responses of the latest calls."""
    said: frozenset[str] = frozenset()
    """Names of settings that were warned about."""
    reads_padding: bool | None = None
    """Whether the policy does; None until it is asked for."""


class ResponseGenerator:
    """Responses from the policy, and from the reference if wanted; made anew for a call, of what its trainer is then.

    Args:
        model: the policy.
        ref_model: the reference, or None where it is the policy without its adapter.
        tokenizer: for ``stop_strings``.
        config: for static padding.
        pad_token_id: what prompts are padded with.
        eos_token_ids: what ends a response unless a call says otherwise.
        engine: what turns padded prompts into responses.
        remembered: of calls before.
    """

    def __init__(
        self,
        model: PreTrainedModelWrapper,
        ref_model: Any,
        tokenizer: Any,
        config: PPOConfig,
        *,
        pad_token_id: int,
        eos_token_ids: set[int],
        engine: Engine,
        remembered: Remembered,
    ) -> None:
        self.model = model
        self.ref_model = ref_model
        self.tokenizer = tokenizer
        self.config = config
        self.pad_token_id = pad_token_id
        self.eos_token_ids = eos_token_ids
        self.engine = engine
        self.remembered = remembered

    def generate(
        self,
        query_tensor: Any,
        length_sampler: Callable[[], int] | None,
        *,
        batch_size: int | None,
        return_prompt: bool,
        generate_ref_response: bool,
        generation_kwargs: dict[str, Any],
    ) -> Any:
        """Sample a response to one query or to each of a list; see ``Trainer.generate``."""
        vocabulary = self.model.config.vocab_size
        queries, single = inputs.query_rows("query_tensor", query_tensor, vocab_size=vocabulary)
        if batch_size is not None:
            batch_size = whole("batch_size", batch_size, COUNT)
        for name, flag in (("return_prompt", return_prompt), ("generate_ref_response", generate_ref_response)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {flag!r}, expected True or False")
        generation_kwargs = self._without_padding_arguments(generation_kwargs)
        settings = Settings(self.model, generation_kwargs)
        check_settings(settings, self.model)
        check_sampler(length_sampler)
        longest, places = longest_response(queries, settings, length_sampler), list(range(len(queries)))
        sharing = _SHARING if batch_size is None else batch_size
        ends_apart = (settings["num_beams"] or 1) > 1 or settings["forced_eos_token_id"] is not None
        if length_sampler is not None and ends_apart:
            batch_size = sharing  # beams that end early, and rows with a forced last token, are not longer ones cut off
        if any(settings[name] for name in _SEEING_ROWS):
            batch_size = sharing  # what they see must not hang on the memory that is free
        if batch_size is None:
            prompt, beams = max(self._static, *map(len, queries)), settings["num_beams"] or 1
            batch_size = rows_together(self.model, prompt, longest, beams=beams)
            if batch_size < len(queries):
                places = by_length(queries)
        plan = self._plan(settings, self._batch_size(queries, batch_size), places)
        if plan.prompt_width:
            inputs.fits_static_padding(
                map(len, queries), plan.prompt_width, setting="pad_max_input_len", what="the prompt"
            )
        models: list[tuple[Any, AbstractContextManager[Any]]] = [(self.model, nullcontext())]
        if generate_ref_response and self.ref_model is not None:
            models.append((self.ref_model, nullcontext()))
        elif generate_ref_response:
            models.append((self.model, reference_context(self.model)))
        # All lengths are drawn before anything is generated, so that one without room is refused in time.
        mosts = [most_tokens(self.model, queries, settings, plan, length_sampler, sharing) for _ in models]
        if not all(have_room(self.model, queries, plan, most) for most in mosts):
            # A batch runs up to its longest response, beside its longest prompt: those that share a length have room.
            before, places = places, list(range(len(queries)))
            plan = self._plan(settings, self._batch_size(queries, sharing), places)
            mosts = [[most for _, most in sorted(zip(before, each, strict=True))] for each in mosts]
        self._warn_of_sampling(settings)
        answers: list[Any] = []
        for (model, context), most in zip(models, mosts, strict=True):
            lengths = [max(most[start : start + plan.batch_size]) for start in range(0, len(most), plan.batch_size)]
            limits = most if length_sampler is not None and len({*most}) > 1 else None
            theirs = Settings(model, generation_kwargs)
            if not has_encoder(self.model):
                theirs.count_responses(max(self._static, *map(len, queries)))
            # Inside, gradients are off, and an interrupt might leave them so.
            as_before = torch.set_grad_enabled(torch.is_grad_enabled())
            casting = computing(model, weights_stay=True)
            with as_before, context, dropout_off(model), casting, self._layers(model, longest):
                answered = self.engine(
                    model,
                    together([queries[place] for place in places], self.model.device),
                    theirs,
                    attrs.evolve(plan, most=limits),
                    lengths if length_sampler is not None else [None] * len(lengths),
                    theirs.overruled() | gaps(theirs),
                )
            seen = inputs.token_rows("what engine= gave: responses", answered, vocab_size=vocabulary)
            inputs.same_count(len(queries), **{"what engine= gave: responses": seen})
            if limits is not None:
                seen = [row[:limit] for row, limit in zip(seen, limits, strict=True)]
                answered = [row[:limit] for row, limit in zip(answered, limits, strict=True)]
            answered = [row.long() for row in answered]
            responses = [answer for _, answer in sorted(zip(places, answered, strict=True), key=itemgetter(0))]
            if not answers:
                self.remembered.drawn.remember(seen, sampled=bool(settings["do_sample"]))
            if return_prompt and not has_encoder(self.model):
                responses = [
                    torch.cat((query.to(response.device), response))
                    for query, response in zip(together(queries, responses[0].device), responses, strict=True)
                ]
            answers.append(responses[0].unsqueeze(0) if single else responses)
        return tuple(answers) if generate_ref_response else answers[0]

    def check(self, length_sampler: Callable[[], int] | None = None, **generation_kwargs: Any) -> None:
        """Refuse the settings that ``generate`` would refuse for any prompt; nothing is drawn."""
        settings = Settings(self.model, self._without_padding_arguments(generation_kwargs))
        check_settings(settings, self.model)
        self._plan(settings, 1, None)
        check_sampler(length_sampler)

    def _without_padding_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """The old trainer's ``remove_padding`` and ``pad_to_multiple_of``, which ask for nothing here, taken out."""
        given = dict(given)
        if (removed := given.pop("remove_padding", True)) is not True:
            raise ValueError(
                f"remove_padding is {removed!r}, expected True or to be left out: responses come without padding; for "
                "one tensor pad them with torch.nn.utils.rnn.pad_sequence(responses, batch_first=True)"
            )
        if given.pop("pad_to_multiple_of", None) is not None:
            self._say_once("pad_to_multiple_of", "pad_to_multiple_of is ignored: prompts are padded to the longest one")
        return given

    def _batch_size(self, queries: list[Tensor], batch_size: int) -> int:
        """Queries generated together: one where padding would be read."""
        static = self._static
        ragged = batch_size > 1 and len({len(query) for query in queries}) > 1
        if has_encoder(self.model) or not (ragged or static) or not self._reads_padding:
            return batch_size
        name = type(transformers_model(self.model)).__name__
        if static:
            raise ValueError(
                f"pad_for_acceleration is True, expected False: {name} reads the padding before a prompt, and would "
                "answer another one"
            )
        self._say_once(
            "reads_padding",
            "%s reads the padding before a prompt: queries of different lengths are answered one by one",
            name,
        )
        return 1

    @property
    def _reads_padding(self) -> bool:
        if self.remembered.reads_padding is None:
            self.remembered.reads_padding = reads_padding(self.model)
        return self.remembered.reads_padding

    @property
    def _static(self) -> int:
        """The width that prompts are padded to; 0 where that is the longest one's."""
        return (self.config.pad_max_input_len or 0) if self.config.pad_for_acceleration else 0

    def _layers(self, model: Any, longest: int) -> AbstractContextManager[Any]:
        return rollout_layers(
            transformers_model(model), self.config.accel, strict=self.config.accel_strict, steps=longest
        )

    def _plan(self, settings: Settings, batch_size: int, places: Sequence[int] | None) -> Plan:
        """Padding and what ends a row, checked."""
        vocabulary = self.model.config.vocab_size
        pad = settings.asked("pad_token_id")
        pad = whole(
            "pad_token_id",
            self.pad_token_id if pad is None else pad,
            COUNT._replace(fits=lambda token: 0 <= token < vocabulary, expected=f"a token id in [0, {vocabulary})"),
        )
        eos = settings["eos_token_id"]
        if eos is None and "eos_token_id" not in settings.keywords:
            eos = self.eos_token_ids
        ends = token_ids("eos_token_id", eos)
        if beyond := [token for token in ends if not 0 <= token < vocabulary]:
            self._say_once(
                "eos_token_id",
                "eos_token_id is %s, but the vocabulary has %d tokens: no response ends with it",
                ", ".join(map(str, beyond)),
                vocabulary,
            )
        start = decoder_start(self.model) if has_encoder(self.model) else None
        if start is not None and (asked := settings.asked("decoder_start_token_id")) not in (None, start):
            raise ValueError(
                f"decoder_start_token_id is {asked!r}, expected {start} like that of the model, behind which the step "
                "scores; set it in the model's generation_config"
            )
        return Plan(
            batch_size=batch_size,
            pad_token_id=pad,
            eos_token_ids=sorted(set(ends) - set(beyond)),
            criteria=criteria_of(
                settings["stopping_criteria"],
                settings["stop_strings"],
                settings["tokenizer"] or self.tokenizer,
            ),
            decoder_start_token_id=start,
            prompt_width=self._static,
            places=places,
        )

    def _warn_of_sampling(self, settings: Settings) -> None:
        found = {name: text for name, text in departures(settings).items() if name not in self.remembered.said}
        if found:
            neutral = ", ".join(f"{name}={NEUTRAL[name]}" for name in found if name in NEUTRAL)
            advice = (
                [f"with {neutral} (ppo_runtime.rollout.sampling.plain() gives all such settings)"] if neutral else []
            )
            advice += [f"without {name}" for name in found if name not in NEUTRAL]  # plain() leaves what is passed
            logger.warning(
                "responses are sampled with %s, but PPO trains the plain distribution: the KL can then turn negative; "
                "sample %s",
                ", ".join(found.values()),
                " and ".join(advice),
            )
        self.remembered.said |= found.keys()

    def warn_of_greedy_responses(self, responses: Sequence[Tensor]) -> None:
        """Said when they are trained on: to look at a policy, greedy responses are as good as others."""
        if self.remembered.drawn.greedy(responses):
            self._say_once(
                "do_sample",
                "the responses were decoded greedily (do_sample is not True), but PPO learns from samples of "
                "the policy's distribution: pass do_sample=True for responses that are trained on",
            )

    def without_start_token(
        self, responses: list[Tensor], masks: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """An encoder-decoder's responses without the decoder's start token, and their masks likewise."""
        if not has_encoder(self.model):
            return responses, masks
        start = decoder_start(self.model)
        started, guessed = inputs.started_rows(responses, start, self.remembered.drawn.returned)
        if guessed:
            self._say_once(
                "start_token",
                "the responses begin with the decoder's start token %d, which a model's own generate puts there, and "
                "so are trained on without it: trainer.generate returns them without it. If the policy drew these "
                "tokens itself, put another one in front of each",
                start,
            )
        return inputs.without_first_where(started, responses, masks)

    def _say_once(self, topic: str, message: str, *values: Any) -> None:
        if topic not in self.remembered.said:
            logger.warning(message, *values)
        self.remembered.said |= {topic}
