"""What a run is made with beside weights and settings: what its models compute, its functions, how it generates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_runtime.models.description import computed_by
from ppo_runtime.trainer import Trainer


def computed(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What the models compute beside their weights."""
    models = {"the policy": trainer.model, "the reference": trainer.ref_model}
    return {name: computed_by(model) for name, model in models.items() if model is not None}


def check_computed(source: Path, then: Mapping[str, Mapping[str, Any]] | None, trainer: Trainer) -> None:
    """Refuse models that make something else of the same weights, by the fields that say so."""
    now = computed(trainer)
    found = [
        f"{fact} of {name} is {now[name][fact]!r:.80}, and was {value!r:.80}"
        for name, facts in (then or {}).items()
        for fact, value in facts.items()
        if fact in now.get(name, {}) and _differ(value, now[name][fact], versioned=" of adapter " not in fact)
    ]
    if found:
        raise ValueError(
            f"{source} was made with models that compute something else: {'; '.join(found[:3])}; make them as they "
            "were made then, or start a new run from the saved model"
        )


def _differ(one: Any, other: Any, *, versioned: bool) -> bool:
    """Whether values differ; of versioned mappings what both know, since fields of configurations come with versions.

    Those of an adapter are the user's own, as ``alpha_pattern``.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping) and versioned:
        return any(_differ(one[name], other[name], versioned=versioned) for name in one.keys() & other.keys())
    return one != other


def made_with(trainer: Trainer) -> dict[str, dict[str, str]]:
    """What a run is made with beside its settings, in texts: what a step calls, its tokens, how it generates."""
    functions = {
        "advantages": trainer.advantage_estimator,
        "policy_loss": trainer.policy_objective,
        "engine": trainer.response_engine,
    }
    return {
        "functions": {name: getattr(one, "__qualname__", type(one).__name__) for name, one in functions.items()},
        "tokens": {"pad_token_id": repr(trainer.pad_token_id), "eos_token_ids": repr(sorted(trainer.eos_token_ids))},
        "generation": {name: f"{value!r:.1000}" for name, value in trainer.generation.items()},
    }


def made_otherwise(then: Mapping[str, Mapping[str, str]], trainer: Trainer) -> list[str]:
    """What differs from :func:`made_with` of then, in words, in the parts that both know."""
    now = made_with(trainer)
    return [
        f"{name:.80} was {then[part].get(name, 'not set'):.80} and is {now[part].get(name, 'not set'):.80}"
        for part in now
        if then.get(part) and now[part]
        for name in sorted(then[part].keys() | now[part].keys())
        if then[part].get(name) != now[part].get(name)
    ]
