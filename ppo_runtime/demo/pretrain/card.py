"""The model card: how the model was made, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_runtime.demo.pretrain.model import CONTEXT, EOS, PAD, VOCABULARY
from ppo_runtime.demo.pretrain.novels import Chapter
from ppo_runtime.demo.pretrain.training import BATCH, CLIP, PEAK_RATE, WARMUP, WEIGHT_DECAY

CARD = """\
# A small Austen

A language model of {parameters:,} parameters that writes like Jane Austen, more or less: fluent for a clause or
two, then dreaming. It exists so that the demo and its tests have a real policy to train without any download.
It was made from nothing by `ppo_runtime/demo/pretrain`, which also wrote this card.

| file | content |
|---|---|
| `model.safetensors` | the weights in float16; load them with `dtype=torch.float32` |
| `config.json`, `generation_config.json` | LLaMA: 6 layers, 6 heads, width 192, MLP 512, context {context}, tied |
| `tokenizer.json`, `tokenizer_config.json` | byte-level BPE of {vocabulary} tokens |
| `prompts.jsonl` | {train_prompts} prompts to train on and {eval_prompts} to evaluate with |

`{eos}` ends a paragraph and `{pad}` pads, on the left. There is no token for a beginning.

## Data

*Emma*, *Mansfield Park*, *Northanger Abbey*, *Persuasion*, *Pride and Prejudice* and *Sense and Sensibility*,
published 1811 to 1818 and in the public domain, in the plain text of the R package `janeaustenr` (MIT licence;
Debian's `r-cran-janeaustenr` 1.0.0-1), which takes them from Project Gutenberg. Title pages, volume and chapter
headings, editors' notes and marks of emphasis are dropped. Each paragraph, put on one line, is a document.

**Held out:** chapters 8, 24, 40 and 56 of each novel, counted from 1 through all its volumes: {chapters_out} of
{chapters} chapters, {tokens_out:,} tokens. {tokens:,} tokens are left to train on. The tokenizer never saw the
held-out chapters either.

## Training

{steps} steps of {batch} sequences of {context} tokens: {seen:,} tokens, {epochs:.1f} epochs. AdamW
(0.9, 0.95), weight decay {decay} on matrices, gradient norm clipped at {clip}; learning rate {rate} after {warmup}
steps of warm-up, held for two thirds of the run, then half a cosine down to zero; dropout {dropout} on what every
block adds to the residual stream; float32 throughout; seed {seed}. The weights kept are those of step {best_step}, with
the lowest held-out loss among the evaluations every {evaluate_every} steps.

**Held-out perplexity: {perplexity:.1f} per token** ({loss:.3f} nats per token, {bits:.2f} bits per byte), measured
on the float16 weights in windows of {context} tokens. The held-out chapters also chose the step, so this is a
little optimistic.

To remake it (under an hour on two CPU cores):

```sh
pip install 'ppo-core[pretrain,demo]'
apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb texts
python -m ppo_runtime.demo.pretrain --texts texts --output assets --steps {steps}{compile}
```

Add `--resume` to finish a run that was cut short. Another machine or release of PyTorch rounds differently, so
the weights will be alike in quality but not in their bits.

## Prompts

Openings of sentences in the held-out chapters, 6 to 12 words long and cut inside the sentence, without quotation
marks, with at least 20 more words in the paragraph, and neutral: VADER's compound score is within 0.05 of zero.
Those marked `eval` come from chapter 24 of each novel, those marked `train` from the other held-out chapters.

## Limits

It knows six novels and nothing else: no facts, no instructions, no modern words, no other language. It keeps the
manners and the prejudices of its source. It is a thing to test reinforcement learning with, and good for no more.
"""


def write_card(
    path: Path,
    chapters: Sequence[Chapter],
    prompts: Sequence[dict[str, str]],
    *,
    loss: float,
    tokens: int,
    tokens_out: int,
    steps: int,
    **settings: Any,
) -> None:
    """Fill in the card.

    Args:
        path: where it goes.
        chapters: all of them, held out or not.
        prompts: what is shipped, with their ``split``.
        loss: in nats per token, over the held-out chapters.
        tokens: how many there are to train on.
        tokens_out: how many are held out.
        steps: how many updates were made.
        settings: everything else that the card names.
    """
    # An end-of-text token stands for the end of a paragraph's line, which is a byte as well.
    held_out_bytes = sum(len(text.encode()) + 1 for c in chapters if c.held_out for text in c.paragraphs)
    card = CARD.format(
        context=CONTEXT,
        vocabulary=VOCABULARY,
        eos=EOS,
        pad=PAD,
        batch=BATCH,
        decay=WEIGHT_DECAY,
        clip=CLIP,
        rate=PEAK_RATE,
        warmup=WARMUP,
        train_prompts=sum(row["split"] == "train" for row in prompts),
        eval_prompts=sum(row["split"] == "eval" for row in prompts),
        chapters=len(chapters),
        chapters_out=sum(chapter.held_out for chapter in chapters),
        tokens=tokens,
        tokens_out=tokens_out,
        steps=steps,
        seen=steps * BATCH * CONTEXT,
        epochs=steps * BATCH * CONTEXT / tokens,
        loss=loss,
        perplexity=math.exp(loss),
        bits=loss * tokens_out / held_out_bytes / math.log(2),
        **settings,
    )
    path.write_text(card, encoding="utf-8")
