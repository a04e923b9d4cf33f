"""The demo's prompts: openings of sentences that the model has never seen."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from ppo_runtime.demo.pretrain.novels import Chapter

EVAL_PROMPT_CHAPTER = 24  # every novel has one, and it is held out
TRAIN_PROMPTS, EVAL_PROMPTS = 512, 64


def openings(chapter: Chapter, rng: random.Random) -> Iterator[str]:
    """The first 6 to 12 words of the chapter's sentences: cut inside the sentence, neutral, without quotation.

    At least four words of the sentence and twenty of the paragraph follow, so there is something to go on to.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    sentiment = SentimentIntensityAnalyzer()
    abbreviated = r"(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)(?<!\b[A-Z]\.)"
    sentence_end = re.compile(rf"""(?:(?<=[.!?])|(?<=[.!?]")){abbreviated}(?: |--)(?=[A-Z])""")
    for paragraph in chapter.paragraphs:
        left = len(paragraph.split())
        for sentence in sentence_end.split(paragraph):
            words = sentence.split()
            for length in rng.sample(range(6, 13), 7):
                prompt = " ".join(words[:length])
                enough = len(words) >= length + 4 and left >= length + 20
                plain = re.fullmatch(r"[A-Z][\w',; .-]*\w", prompt) and "--" not in prompt
                if enough and plain and abs(sentiment.polarity_scores(prompt)["compound"]) < 0.05:
                    yield prompt
                    break
            left -= len(words)


def make_prompts(chapters: list[Chapter], seed: int) -> list[dict[str, str]]:
    """Shuffled prompts from held-out chapters; no chapter gives to both splits, and no prompt comes twice."""
    rng = random.Random(seed)
    seen: set[str] = set()
    found: dict[str, list[str]] = {"train": [], "eval": []}
    for chapter in chapters:
        if chapter.held_out:
            for prompt in openings(chapter, rng):
                if prompt.casefold() not in seen:
                    seen.add(prompt.casefold())
                    found["eval" if chapter.number == EVAL_PROMPT_CHAPTER else "train"].append(prompt)
    rows = [
        {"prompt": prompt, "split": split}
        for split, count in (("train", TRAIN_PROMPTS), ("eval", EVAL_PROMPTS))
        for prompt in rng.sample(found[split], min(count, len(found[split])))
    ]
    rng.shuffle(rows)
    return rows
