"""Next-token training that may be cut short anywhere: every step is a function of (seed, step) alone."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ppo_runtime.demo.pretrain.model import CONTEXT

log = logging.getLogger(__name__)

BATCH = 8
PEAK_RATE, WARMUP, WEIGHT_DECAY, CLIP = 2e-3, 100, 0.1, 1.0


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
