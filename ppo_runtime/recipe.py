"""What a training script does before and around the loop: load a policy, read and tokenise prompts, score texts.

Each is a function of its arguments alone, so that a script takes the ones it needs and writes the rest itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, pipeline

from ppo_runtime.models.wrapper import AutoModelForCausalLMWithValueHead

if TYPE_CHECKING:
    from datasets import Dataset

Scores = Callable[[list[str], list[str]], list[float]]
"""From prompts and their responses to one score each."""


def load_policy(
    source: str | PathLike[str], *, zero_head: bool = False, **kwargs: Any
) -> tuple[AutoModelForCausalLMWithValueHead, Any]:
    """A decoder-only policy with its value head, and its tokenizer, which pads on the left as generation needs it.

    Args:
        source: a transformers directory or a hub name.
        zero_head: set the value head to 0, also one that is stored there.
        kwargs: for the model's ``from_pretrained``, such as ``dtype`` and ``peft_config``.
    """
    # The model first: where neither is there, its message is the one that helps.
    model = AutoModelForCausalLMWithValueHead.from_pretrained(source, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    if zero_head:
        # A head that starts random makes the first advantages noise; at 0 the critic starts from "nothing is expected".
        torch.nn.init.zeros_(model.v_head.summary.weight)
        torch.nn.init.zeros_(model.v_head.summary.bias)
    return model, tokenizer


def tokenized(prompts: Sequence[str], tokenizer: Any, *, add_special_tokens: bool = False) -> Dataset:
    """A dataset with "query" and "input_ids", for a trainer.

    Raises:
        ValueError: one text instead of a list of them, or none.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts is {prompts!r}, expected a list of texts, one at least")
    from datasets import Dataset

    ids = tokenizer(list(prompts), add_special_tokens=add_special_tokens)["input_ids"]
    return Dataset.from_dict({"query": list(prompts), "input_ids": ids})


def read_prompts(path: str | PathLike[str]) -> list[str]:
    """The lines of a file but for blank ones.

    Raises:
        ValueError: it is no text in UTF-8, or holds no prompt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}), expected one prompt a line") from error
    # Not splitlines, which takes a vertical tab and other characters of a prompt for its end.
    if not (lines := [line for line in text.split("\n") if line.strip()]):
        raise ValueError(f"{path} holds no prompt, expected one a line")
    return lines


def classifier_scores(reward_model: str | PathLike[str], label: str | None = None) -> Scores:
    """Score prompt and response together by a sequence classifier's logit for one label, on the processor.

    Args:
        reward_model: a transformers directory or a hub name.
        label: one of the classifier's; its last one if None.

    Raises:
        ValueError: the classifier has no such label.
    """
    classifier: Any = pipeline("text-classification", model=str(reward_model), device=-1)
    size = _padding_of_its_own(classifier)
    # A longer text loses its beginning: its end is the response, which is what is scored.
    classifier.tokenizer.truncation_side = "left"
    limits = classifier.tokenizer.model_max_length, getattr(classifier.model.config, "max_position_embeddings", None)
    known = [limit for limit in limits if limit and limit < 10**6]  # a tokenizer without one says 10**30
    cut = {"truncation": True, "max_length": min(known)} if known else {}
    labels = classifier.model.config.id2label
    label = labels[max(labels)] if label is None else label
    if label not in labels.values():
        raise ValueError(f"label is {label!r}, expected one of the reward model's: {', '.join(labels.values())}")

    def score(queries: list[str], responses: list[str]) -> list[float]:
        texts = [query + response for query, response in zip(queries, responses, strict=True)]
        outputs = classifier(texts, top_k=None, function_to_apply="none", batch_size=size or len(texts), **cut)
        return [next(entry["score"] for entry in output if entry["label"] == label) for output in outputs]

    return score


def _padding_of_its_own(classifier: Any) -> int | None:
    """Give a reward model without padding token (GPT-2's kin) its EOS for one; 1, the batch size, if it has none."""
    tokenizer, config = classifier.tokenizer, classifier.model.config
    # A decoder that counts positions from the row's first entry would see padding in front of it.
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id  # where such a model looks for the end of a text
    return 1 if tokenizer.pad_token_id is None else None
