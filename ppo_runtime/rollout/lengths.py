"""How long each response may become: what settings or a drawn length ask for, where there is room for it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ppo_runtime.models.context import Context
from ppo_runtime.models.inner import has_encoder
from ppo_runtime.rollout.plan import Plan
from ppo_runtime.rollout.settings import Settings
from ppo_runtime.rollout.values import COUNT, whole

# Tokens of a response whose length nobody has told.
_SUPPOSED = 1024


def check_sampler(length_sampler: Any) -> None:
    """Refuse what gives no length."""
    if length_sampler is not None and not callable(length_sampler):
        raise ValueError(
            f"length_sampler is {length_sampler!r}, expected a function that gives a length, such as "
            "LengthSampler(4, 17)"
        )


def longest_response(queries: list[Tensor], settings: Settings, length_sampler: Callable[[], int] | None) -> int:
    """Tokens of a response at most, as far as that can be told before a length is drawn."""
    if length_sampler is not None:
        # A LengthSampler's; what others call so may be anything.
        lengths = getattr(length_sampler, "values", None)
        if isinstance(lengths, list) and all(type(length) is int and length > 0 for length in lengths):
            return max(lengths, default=_SUPPOSED)
        return _SUPPOSED
    if settings["max_new_tokens"] is not None:
        return settings["max_new_tokens"]
    return max(1, (settings["max_length"] or _SUPPOSED) - max(map(len, queries)))


def most_tokens(
    model: Any,
    queries: list[Tensor],
    settings: Settings,
    plan: Plan,
    length_sampler: Callable[[], int] | None,
    sharing: int,
) -> list[int]:
    """Most tokens of each response, in the plan's order, where there is room for them.

    One length is drawn for every ``sharing`` queries in the caller's order, however many memory holds.
    """
    drawn: list[int] = []
    if length_sampler is not None:
        groups = range(0, len(queries), sharing)
        drawn = [whole("what length_sampler gives", length_sampler(), COUNT) for _ in groups]
    lengths = [len(query) for query in queries]
    # Of all queries, as if memory held them together.
    width = 1 if has_encoder(model) else max(plan.prompt_width, *lengths)
    most, what = 1, "a token"
    if length_sampler is not None:
        what = "length_sampler's length"
    elif settings["max_new_tokens"] is not None:
        most, what = settings["max_new_tokens"], "max_new_tokens"
    elif settings["max_length"] is not None:
        most, what = settings["max_length"] - width, "the rest of max_length"
        if most < 1:
            raise ValueError(
                f"max_length is {settings['max_length']}, expected more than {width}, the longest prompt, "
                "which it counts too; pass max_new_tokens instead"
            )
    mosts = [drawn[place // sharing] if drawn else most for place in range(len(queries))]
    Context.of(model).check(lengths, mosts, names=("query_tensor", "query_tensor"), response=what, first=0)
    return mosts if plan.places is None else [mosts[place] for place in plan.places]


def have_room(model: Any, queries: list[Tensor], plan: Plan, mosts: list[int]) -> bool:
    """Whether every batch has room for its longest prompt and its longest response together."""
    room = Context.of(model).row
    places = range(len(queries)) if plan.places is None else plan.places
    widths = [max(plan.prompt_width, len(queries[place])) for place in places]
    batches = [slice(start, start + plan.batch_size) for start in range(0, len(mosts), plan.batch_size)]
    return room is None or all(max(widths[batch]) + max(mosts[batch]) <= room for batch in batches)
