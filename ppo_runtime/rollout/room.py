"""How long a prompt may be, so that the response that a run asks for has room as well."""

from typing import Any, NamedTuple

from ppo_runtime.models.context import Context
from ppo_runtime.models.inner import has_encoder
from ppo_runtime.rollout.settings import Settings

_CONTEXT, _STATIC = "the model's context", "pad_max_len of PPOConfig"


class Room(NamedTuple):
    """The most tokens of a prompt, None if nothing limits them, and what it must be that short for."""

    tokens: int | None = None
    why: str = ""


def prompt_room(trainer: Any, generation_kwargs: dict[str, Any]) -> Room:
    """What the model's context, static padding and the settings of generation leave for a prompt.

    With a ``length_sampler`` a response is taken to have one token: none longer is certain.

    Raises:
        ValueError: a response as long as was asked for has no room, whatever the prompt.
    """
    config, context, apart = trainer.config, Context.of(trainer.model), has_encoder(trainer.model)
    sampled = generation_kwargs.get("length_sampler") is not None
    settings = Settings(trainer.model, {k: v for k, v in generation_kwargs.items() if k != "length_sampler"})
    response = 1 if sampled or settings["max_new_tokens"] is None else settings["max_new_tokens"]
    static = config.pad_max_len if config.pad_for_acceleration else None
    # An encoder-decoder has a row for the response alone; elsewhere a prompt of at least a token shares it.
    shared = {_CONTEXT: context.row, _STATIC: None if apart else static}
    alone = {_CONTEXT: context.response, _STATIC: static if apart else None}
    rooms: list[Room] = []
    for limits, prompt in ((shared, 1), (alone, 0)):
        for what, limit in limits.items():
            if limit is None:
                continue
            if limit - response < prompt:
                raise ValueError(
                    f"generation_kwargs['max_new_tokens'] is {response}, expected at most {limit - prompt}: a row of "
                    f"{what} has {limit} tokens; generate fewer"
                )
            if prompt:
                rooms.append(Room(limit - response, f"the response fits into {what}"))
    if context.prompt is not None:
        rooms.append(Room(context.prompt, f"it fits into {_CONTEXT}"))
    if config.pad_for_acceleration and config.pad_max_input_len:
        rooms.append(Room(config.pad_max_input_len, "it fits into pad_max_input_len of PPOConfig"))
    most = settings["max_length"]
    if not apart and not sampled and most is not None and settings["max_new_tokens"] is None:
        rooms.append(Room(most - 1, "max_length, which counts it too, leaves a response"))
    return min(rooms, default=Room())
