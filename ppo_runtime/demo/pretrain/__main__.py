"""The command line: novels in; model, tokenizer, prompts and model card out."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.logging import RichHandler
from transformers import LlamaForCausalLM

from ppo_runtime.demo.pretrain.card import write_card
from ppo_runtime.demo.pretrain.model import build_model, export, regularise, train_tokenizer
from ppo_runtime.demo.pretrain.novels import read_chapters
from ppo_runtime.demo.pretrain.prompts import make_prompts
from ppo_runtime.demo.pretrain.training import encode, held_out_loss, train

log = logging.getLogger(__name__)


def pretrain(
    texts: Annotated[Path, typer.Option(help="What dpkg -x made of r-cran-janeaustenr.", exists=True, file_okay=False)],
    output: Annotated[Path, typer.Option(help="Where model, tokenizer, prompts and card go.", file_okay=False)],
    steps: Annotated[int, typer.Option(help="Updates of 8 x 256 tokens.", min=1)] = 1400,
    dropout: Annotated[float, typer.Option(help="On what every block adds.", min=0, max=0.9)] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of everything that is random.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    evaluate_every: Annotated[int, typer.Option(help="Steps between held-out evaluations.", min=1)] = 200,
    save_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.", min=0)] = 180,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the training step: twice as fast.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUTPUT/checkpoint.pt.")] = False,
) -> None:
    """Make the demo's language model from nothing."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)

    chapters = read_chapters(texts)
    kept = [text for chapter in chapters if not chapter.held_out for text in chapter.paragraphs]
    unseen = [text for chapter in chapters if chapter.held_out for text in chapter.paragraphs]
    tokenizer = train_tokenizer(kept)
    stream, held_out = encode(tokenizer, kept), encode(tokenizer, unseen)
    log.info("%d tokens to train on, %d held out", len(stream), len(held_out))

    checkpoint = output / "checkpoint.pt"
    torch.manual_seed(seed)
    model = build_model(tokenizer)
    regularise(model, dropout)
    best = train(
        model,
        stream,
        held_out,
        steps=steps,
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
        evaluate_every=evaluate_every,
        save_seconds=save_seconds,
        compiled=compiled,
    )

    model.load_state_dict(best.weights)
    prompts = make_prompts(chapters, seed)
    export(model, tokenizer, prompts, output)
    shipped = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    loss = held_out_loss(shipped, held_out)
    log.info("held-out loss %.4f, perplexity %.2f", loss, math.exp(loss))
    write_card(
        output / "README.md",
        chapters,
        prompts,
        parameters=shipped.num_parameters(),
        tokens=len(stream),
        tokens_out=len(held_out),
        loss=loss,
        steps=steps,
        best_step=best.step,
        dropout=dropout,
        seed=seed,
        evaluate_every=evaluate_every,
        compile=" --compile" if compiled else "",
    )
    checkpoint.unlink()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(pretrain)
    app(prog_name="python -m ppo_runtime.demo.pretrain")
