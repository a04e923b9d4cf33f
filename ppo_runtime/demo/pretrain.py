"""Make the demo's language model from nothing: six novels in, a small LLaMA with its tokenizer and prompts out.

    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb texts
    python -m ppo_runtime.demo.pretrain --texts texts --output ppo_runtime/demo/assets

The texts are Jane Austen's six finished novels, in the public domain. Whole chapters are held out: the ones whose
number leaves the remainder 8 when divided by 16 (8, 24, 40 and 56, counted through each novel from 1). Nothing
of them reaches the tokenizer or the weights, so the demo's prompts, which are their sentences' openings, ask the
model to continue what it has never seen.

Every batch and every dropout mask is a function of (seed, step) alone. A run that was cut short and finished with
``--resume`` therefore does the same arithmetic as one that was left in peace.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import logging
import lzma
import math
import random
import re
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY, CONTEXT, BATCH = 4096, 256, 8
PEAK_RATE, WARMUP, WEIGHT_DECAY, CLIP = 2e-3, 100, 0.1, 1.0
HOLD_OUT_EVERY, HOLD_OUT_PHASE = 16, 8
EVAL_PROMPT_CHAPTER = 24  # every novel has one, and it is held out
TRAIN_PROMPTS, EVAL_PROMPTS = 512, 64


# --- Reading ---------------------------------------------------------------------------------------------------


class Chapter(NamedTuple):
    """One chapter of one novel: ``number`` counts through the whole novel, across its volumes."""

    novel: str
    number: int
    paragraphs: list[str]

    @property
    def held_out(self) -> bool:
        """Kept from the tokenizer and the weights."""
        return self.number % HOLD_OUT_EVERY == HOLD_OUT_PHASE


def read_lazyload(directory: Path) -> dict[str, list[str]]:
    """The character vectors in an R lazy-load database ``Rdata.rdb`` with its index ``Rdata.rdx``.

    The index is one compressed R object that maps each variable to (offset, length). Each chunk begins with the
    big-endian size of its content, perhaps a letter for the compressor, and then the compressed R object.
    """
    import rdata

    def load(serialised: bytes) -> dict | list:
        with warnings.catch_warnings():  # rdata guesses the type, since there is no file name to tell it
            warnings.simplefilter("ignore")
            return rdata.conversion.convert(rdata.parser.parse_data(serialised))

    def inflate(chunk: bytes) -> bytes:
        match chunk[4:5]:
            case b"2":
                return bz2.decompress(chunk[5:])
            case b"Z":
                filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
                return lzma.decompress(chunk[5:], lzma.FORMAT_RAW, filters=filters)
            case _:
                return zlib.decompress(chunk[4:])

    index: Any = load(gzip.decompress((directory / "Rdata.rdx").read_bytes()))
    chunks = (directory / "Rdata.rdb").read_bytes()
    return {
        str(name): [str(line) for line in load(inflate(chunks[offset : offset + length]))]
        for name, (offset, length) in index["variables"].items()
    }


def normalise(paragraph: str) -> str:
    """One line of plain text: single spaces, and no underscores for emphasis or stars for footnotes."""
    return " ".join(re.sub(r"[_*]", "", paragraph).split())


def chapters_of(novel: str, lines: list[str]) -> Iterator[Chapter]:
    """Cut a novel at its chapter headings; what stands before the first or after the end is dropped."""
    heading = re.compile(r"\s*chapter\s+([0-9]+|[ivxlc]+)\.?\s*", re.IGNORECASE)
    ending = re.compile(r"\s*(finis|the end|a note on the text)\.?\s*", re.IGNORECASE)
    apparatus = re.compile(r"\s*(volume\s+[ivx]+\s*$|\[.*(volume|press)|\*vide)", re.IGNORECASE | re.DOTALL)
    starts = [i for i, line in enumerate(lines) if heading.fullmatch(line)]
    end = next((i for i, line in enumerate(lines) if ending.fullmatch(line)), len(lines))
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], end], strict=True), 1):
        blocks = re.split(r"\n\s*\n", "\n".join(lines[start + 1 : stop]))
        paragraphs = (normalise(block) for block in blocks if not apparatus.match(block))
        yield Chapter(novel, number, [text for text in paragraphs if re.search(r"\w", text)])


def read_chapters(texts: Path) -> list[Chapter]:
    """Every chapter of the six novels, from what ``dpkg -x`` made of the package."""
    found = sorted(texts.rglob("janeaustenr/data/Rdata.rdb"))
    if not found:
        raise SystemExit(f"{texts} holds no janeaustenr/data/Rdata.rdb: unpack the package there with dpkg -x")
    novels = read_lazyload(found[0].parent)
    return [chapter for novel in sorted(novels) for chapter in chapters_of(novel, novels[novel])]


# --- Tokenizer and model ---------------------------------------------------------------------------------------


def train_tokenizer(paragraphs: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text has an encoding, and decoding gives it back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA of 3.4 million parameters with fresh weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.backend_tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.backend_tokenizer.token_to_id(PAD),
        )
    )


def regularise(model: LlamaForCausalLM, rate: float) -> None:
    """Dropout on what each attention and MLP block adds to the residual stream, which LLaMA itself lacks."""
    layers: Any = model.model.layers
    for layer in layers:
        layer.self_attn.o_proj.register_forward_hook(lambda m, _, out: F.dropout(out, rate, m.training))
        layer.mlp.down_proj.register_forward_hook(lambda m, _, out: F.dropout(out, rate, m.training))


# --- Training --------------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerFast, paragraphs: list[str]) -> Tensor:
    """All paragraphs as one stream of tokens, each followed by the end-of-text token."""
    rows = tokenizer.backend_tokenizer.encode_batch(paragraphs)
    return torch.tensor([token for row in rows for token in [*row.ids, tokenizer.eos_token_id]])


def batch_at(stream: Tensor, step: int, seed: int) -> Tensor:
    """The batch of a step, [BATCH, CONTEXT]; an epoch cuts the stream at a fresh offset and shuffles the pieces."""
    per_epoch = (len(stream) // CONTEXT - 1) // BATCH
    epoch, position = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(CONTEXT, (), generator=generator))
    order = torch.randperm(per_epoch * BATCH, generator=generator)
    rows = order[position * BATCH : (position + 1) * BATCH, None] * CONTEXT + torch.arange(CONTEXT)
    return stream[offset + rows]


def fall(steps: int) -> int:
    """The step from which the learning rate falls: the last third of the run."""
    return 2 * steps // 3


def rate_at(step: int, steps: int) -> float:
    """Linear warm-up to the peak, the peak for two thirds of the run, then half a cosine down to zero.

    Until it falls the rate does not depend on ``steps``, so a run may still be lengthened or shortened there.
    """
    if step < fall(steps):
        return PEAK_RATE * min(1.0, (step + 1) / WARMUP)
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - fall(steps)) / (steps - fall(steps))))


def next_token_loss(model: LlamaForCausalLM, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each token given those before it, in nats."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Tensor) -> float:
    """Mean loss in nats per token over the held-out stream, cut into pieces of one context each."""
    model.eval()
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = sum(float(next_token_loss(model, part, "sum")) for part in windows.split(BATCH))
    model.train()
    return total / (windows.numel() - len(windows))


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' gains alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


class Best(NamedTuple):
    """The weights with the lowest held-out loss so far."""

    loss: float
    step: int
    weights: dict[str, Tensor]


def train(
    model: LlamaForCausalLM,
    stream: Tensor,
    held_out: Tensor,
    *,
    steps: int,
    seed: int,
    checkpoint: Path,
    resume: bool,
    evaluate_every: int,
    save_seconds: float,
    compiled: bool,
) -> Best:
    """Train to ``steps`` and give back the best weights seen; ``checkpoint`` lets a cut run go on."""
    training_loss = torch.compile(next_token_loss, dynamic=False) if compiled else next_token_loss
    optimizer = make_optimizer(model)
    best, first = Best(math.inf, 0, {}), 0
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        falling = saved["step"] > fall(min(steps, saved["steps"]))
        if saved["seed"] != seed or (falling and saved["steps"] != steps):
            raise SystemExit(f"{checkpoint} is of a run with --steps {saved['steps']} --seed {saved['seed']}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        best, first = Best(*saved["best"]), saved["step"]
        log.info("resumed at step %d", first)

    def save(step: int) -> None:
        state = {"steps": steps, "seed": seed, "step": step, "best": tuple(best)}
        temporary = checkpoint.with_suffix(".partial")
        torch.save(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
        temporary.replace(checkpoint)

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  held out {task.fields[best]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    model.train()
    started = saved_at = time.monotonic()
    smooth = math.nan
    with Progress(*columns) as progress:
        task = progress.add_task("", total=steps, completed=first, loss=smooth, best=best.loss, speed=0.0)
        for step in range(first, steps):
            torch.manual_seed(seed * 1_000_003 + step)  # the dropout masks of this step
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps)
            loss = training_loss(model, batch_at(stream, step, seed))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
            speed = (done - first) * BATCH * CONTEXT / (time.monotonic() - started)
            if done % evaluate_every == 0 or done == steps:
                score = held_out_loss(model, held_out)
                if score < best.loss:
                    best = Best(score, done, {k: v.clone() for k, v in model.state_dict().items()})
                log.info("step %d train %.4f held out %.4f, %.0f tokens/s", done, smooth, score, speed)
            if time.monotonic() - saved_at > save_seconds or done == steps:
                save(done)
                saved_at = time.monotonic()
            progress.update(task, completed=done, loss=smooth, best=best.loss, speed=speed)
    return best


# --- What the demo ships ---------------------------------------------------------------------------------------


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


CARD = """\
# A small Austen

A language model of {parameters:,} parameters that writes like Jane Austen, more or less: fluent for a clause or
two, then dreaming. It exists so that the demo and its tests have a real policy to train without any download.
It was made from nothing by `ppo_runtime/demo/pretrain.py`, which also wrote this card.

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


def export(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[dict[str, str]], output: Path
) -> None:
    """Write the model in half precision, the tokenizer and the prompts."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in prompts)
    (output / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command line: train, then write everything the demo ships."""
    parser = argparse.ArgumentParser(description="Make the demo's language model from nothing.")
    parser.add_argument("--texts", type=Path, required=True, help="what dpkg -x made of r-cran-janeaustenr")
    parser.add_argument("--output", type=Path, required=True, help="where model, tokenizer and prompts go")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps between held-out evaluations")
    parser.add_argument("--save-seconds", type=float, default=180, help="seconds between checkpoints")
    parser.add_argument("--compile", action="store_true", help="compile the training step (about twice as fast)")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/checkpoint.pt")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)

    chapters = read_chapters(args.texts)
    kept = [text for chapter in chapters if not chapter.held_out for text in chapter.paragraphs]
    unseen = [text for chapter in chapters if chapter.held_out for text in chapter.paragraphs]
    tokenizer = train_tokenizer(kept)
    stream, held_out = encode(tokenizer, kept), encode(tokenizer, unseen)
    log.info("%d tokens to train on, %d held out", len(stream), len(held_out))

    checkpoint = args.output / "checkpoint.pt"
    torch.manual_seed(args.seed)
    model = build_model(tokenizer)
    regularise(model, args.dropout)
    best = train(
        model,
        stream,
        held_out,
        steps=args.steps,
        seed=args.seed,
        checkpoint=checkpoint,
        resume=args.resume,
        evaluate_every=args.evaluate_every,
        save_seconds=args.save_seconds,
        compiled=args.compile,
    )
    prompts = make_prompts(chapters, args.seed)
    model.load_state_dict(best.weights)
    export(model, tokenizer, prompts, args.output)

    shipped = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    loss = held_out_loss(shipped, held_out)
    log.info("held-out loss %.4f, perplexity %.2f, of step %d", loss, math.exp(loss), best.step)
    unseen_bytes = sum(len(text.encode()) + 1 for text in unseen)  # an end of text stands for a line's end
    seen = args.steps * BATCH * CONTEXT
    card = CARD.format(
        parameters=shipped.num_parameters(),
        context=CONTEXT,
        vocabulary=VOCABULARY,
        eos=EOS,
        pad=PAD,
        train_prompts=sum(row["split"] == "train" for row in prompts),
        eval_prompts=sum(row["split"] == "eval" for row in prompts),
        chapters=len(chapters),
        chapters_out=sum(chapter.held_out for chapter in chapters),
        tokens=len(stream),
        tokens_out=len(held_out),
        steps=args.steps,
        batch=BATCH,
        seen=seen,
        epochs=seen / len(stream),
        decay=WEIGHT_DECAY,
        clip=CLIP,
        rate=PEAK_RATE,
        warmup=WARMUP,
        dropout=args.dropout,
        seed=args.seed,
        best_step=best.step,
        evaluate_every=args.evaluate_every,
        perplexity=math.exp(loss),
        loss=loss,
        bits=loss * len(held_out) / unseen_bytes / math.log(2),
        compile=" --compile" if args.compile else "",
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")
    checkpoint.unlink()


if __name__ == "__main__":
    main()
