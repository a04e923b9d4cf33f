"""The classic loop, written out: prompts, a LoRA policy, a reward model in a pipeline, steps, logs and saves.

    python -m ppo_runtime.demo.classic --model DIR --reward-model DIR --output runs/classic

Read :func:`run` as the template of a script of your own. ``--model`` is any decoder-only transformers model, such as
SmolLM2-135M; ``--reward-model`` a sequence classifier, whose logit for ``--label`` is the score of prompt and response.
Without one, VADER's sentiment of the response is (``pip install 'ppo-core[demo]'``).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import attrs
import torch
import typer

from ppo_runtime import LengthSampler, PPOConfig, PPOTrainer, set_seed
from ppo_runtime.arguments import make_writable
from ppo_runtime.demo.run import load_prompts, sentiment
from ppo_runtime.loop import closing
from ppo_runtime.models.inner import import_peft
from ppo_runtime.recipe import Scores, classifier_scores, load_policy, read_prompts, tokenized
from ppo_runtime.rollout.prompts import check_dataset
from ppo_runtime.rollout.room import prompt_room


@attrs.frozen(kw_only=True)
class ClassicOptions:
    """What the command line can change."""

    model: Path
    output: Path
    reward_model: Path | None = None
    label: str | None = None
    """The classifier's label to raise; its last one if None."""
    prompts: Path | None = None
    """One prompt a line, blank ones aside; the demo's openings of novels if None."""
    steps: int = 20
    batch_size: int = 16
    mini_batch_size: int = 4
    response_length: tuple[int, int] = (8, 24)
    """Shortest and longest response, in tokens."""
    learning_rate: float = 1e-4
    rank: int = 8
    """Of the LoRA adapter; 0 trains the whole model."""
    dtype: str = "float32"
    """Of the base model; "bfloat16" halves its memory, and is slow on processors without instructions for it."""
    save_every: int = 10
    seed: int = 0


def run(options: ClassicOptions) -> list[dict[str, Any]]:
    """Train, write metrics.jsonl and step-<n>/ to the output directory, and return the statistics of every step."""
    set_seed(options.seed)
    queries = read_prompts(options.prompts) if options.prompts else load_prompts()["train"]
    adapter = None
    if options.rank:
        adapter = import_peft().LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model, tokenizer = load_policy(options.model, dtype=getattr(torch, options.dtype), peft_config=adapter)
    dataset = tokenized(queries, tokenizer, add_special_tokens=True)
    config = PPOConfig(
        exp_name="classic",
        seed=options.seed,
        steps=options.steps * options.batch_size,
        batch_size=options.batch_size,
        mini_batch_size=options.mini_batch_size,
        learning_rate=options.learning_rate,
        init_kl_coef=0.05,
        max_grad_norm=1.0,
        project_kwargs={"logging_dir": str(options.output)},
    )
    trainer = PPOTrainer(config, model, None, tokenizer, dataset=dataset)
    score = _scores(options)
    shortest, longest = options.response_length
    length_sampler = LengthSampler(shortest, longest + 1)
    sampling: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0}

    # Whatever can be known is found out now: a prompt without room beside the longest response, a place to write.
    room = prompt_room(trainer, {"max_new_tokens": longest})
    check_dataset(dataset, vocab_size=trainer.model.config.vocab_size, room=room)
    make_writable("output", options.output)

    history: list[dict[str, Any]] = []
    assert trainer.dataloader is not None
    with closing(trainer):
        while len(history) < options.steps:
            for batch in trainer.dataloader:
                query_tensors = [torch.tensor(ids) for ids in batch["input_ids"]]
                response_tensors = trainer.generate(
                    query_tensors,
                    batch_size=options.batch_size,
                    return_prompt=False,
                    length_sampler=length_sampler,
                    **sampling,
                )
                batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)
                rewards = [torch.tensor(value) for value in score(batch["query"], batch["response"])]
                stats = trainer.step(query_tensors, response_tensors, rewards)
                trainer.log_stats(stats, batch, rewards)
                history.append(stats)
                step = len(history)
                if step % options.save_every == 0 or step == options.steps:
                    trainer.save_pretrained(options.output / f"step-{step}")
                mean = sum(map(float, rewards)) / len(rewards)
                if trainer.world.rank == 0:
                    print(f"step {step}/{options.steps}  score {mean:+.3f}  KL {stats['objective/kl']:.3f}", flush=True)
                if step == options.steps:
                    break
    return history


def _scores(options: ClassicOptions) -> Scores:
    """The reward: a classifier's logit for one label, or VADER's sentiment."""
    if options.reward_model is not None:
        return classifier_scores(options.reward_model, options.label)
    analyse = sentiment()
    return lambda _, responses: analyse(responses)


def _default(name: str) -> Any:
    return attrs.fields_dict(ClassicOptions)[name].default


def command(
    model: Annotated[Path, typer.Option(help="The policy, a transformers directory.", exists=True, file_okay=False)],
    output: Annotated[Path, typer.Option(help="Where metrics and models go.", file_okay=False)],
    reward_model: Annotated[
        Path | None, typer.Option(help="A sequence classifier; VADER's sentiment without one.", exists=True)
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="The classifier's label to raise; its last one if not given.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="One prompt a line; openings of novels if not given.", exists=True, dir_okay=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="PPO steps.", min=1)] = _default("steps"),
    batch_size: Annotated[int, typer.Option(help="Responses per step.", min=1)] = _default("batch_size"),
    mini_batch_size: Annotated[int, typer.Option(help="Responses per pass.", min=1)] = _default("mini_batch_size"),
    response_length: Annotated[
        tuple[int, int], typer.Option(help="Shortest and longest response, in tokens.", metavar="LEAST MOST")
    ] = _default("response_length"),
    learning_rate: Annotated[float, typer.Option(help="Adam's.")] = _default("learning_rate"),
    rank: Annotated[int, typer.Option(help="Of the LoRA adapter; 0 trains the whole model.", min=0)] = _default("rank"),
    dtype: Annotated[str, typer.Option(help="Of the base model, such as bfloat16.")] = _default("dtype"),
    save_every: Annotated[int, typer.Option(help="Steps between saves.", min=1)] = _default("save_every"),
    seed: Annotated[int, typer.Option(help="Seed of everything that is random.", min=0)] = _default("seed"),
) -> None:
    """The classic loop: prompts, a LoRA policy, a reward model in a pipeline, steps, logs and saves."""
    least, most = response_length
    if not 1 <= least <= most:
        raise typer.BadParameter(f"--response-length is {least} {most}, expected LEAST from 1 and MOST from LEAST on")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"--dtype is {dtype}, expected one of float32, bfloat16, float16")
    run(
        ClassicOptions(
            model=model,
            output=output,
            reward_model=reward_model,
            label=label,
            prompts=prompts,
            steps=steps,
            batch_size=batch_size,
            mini_batch_size=mini_batch_size,
            response_length=response_length,
            learning_rate=learning_rate,
            rank=rank,
            dtype=dtype,
            save_every=save_every,
            seed=seed,
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    app = typer.Typer(add_completion=False)
    app.command()(command)
    app(args=arguments, prog_name="python -m ppo_runtime.demo.classic", standalone_mode=arguments is None)


if __name__ == "__main__":
    main()
