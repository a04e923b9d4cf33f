"""The classic loop, written out: prompts, a LoRA policy, a reward model in a pipeline, steps, logs and saves.

    python -m ppo_runtime.demo.classic --model DIR --reward-model DIR --output runs/classic

Read :func:`run` as the template of a script of your own. ``--model`` is any decoder-only transformers model, such as
SmolLM2-135M; ``--reward-model`` a sequence classifier, whose logit for ``--label`` is the score of prompt and response.
Without one, VADER's sentiment of the response is (``pip install 'ppo-core[demo]'``).
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from datasets import Dataset
from transformers import AutoTokenizer, pipeline

from ppo_runtime import AutoModelForCausalLMWithValueHead, LengthSampler, PPOConfig, PPOTrainer, set_seed
from ppo_runtime.demo.run import load_prompts, sentiment
from ppo_runtime.inner import import_peft

Scores = Callable[[list[str], list[str]], list[float]]


@attrs.frozen(kw_only=True)
class ClassicOptions:
    """What the command line can change."""

    model: Path
    output: Path
    reward_model: Path | None = None
    label: str | None = None
    """The classifier's label to raise; its last one if None."""
    prompts: Path | None = None
    """One prompt a line; the demo's openings of novels if None."""
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
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    queries = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else load_prompts()["train"]
    dataset = Dataset.from_dict({"query": queries, "input_ids": [tokenizer(query)["input_ids"] for query in queries]})

    adapter = None
    if options.rank:
        adapter = import_peft().LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), peft_config=adapter
    )
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

    history: list[dict[str, Any]] = []
    assert trainer.dataloader is not None
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
            print(f"step {step}/{options.steps}  score {mean:+.3f}  KL {stats['objective/kl']:.3f}", flush=True)
            if step == options.steps:
                break
    trainer.close()
    return history


def _scores(options: ClassicOptions) -> Scores:
    """The reward: a classifier's logit for one label, or VADER's sentiment."""
    if options.reward_model is None:
        analyse = sentiment()
        return lambda _, responses: analyse(responses)
    classifier: Any = pipeline("text-classification", model=str(options.reward_model), device=-1)
    labels = classifier.model.config.id2label
    label = labels[max(labels)] if options.label is None else options.label
    if label not in labels.values():
        raise ValueError(f"label is {label!r}, expected one of the reward model's: {', '.join(labels.values())}")

    def score(queries: list[str], responses: list[str]) -> list[float]:
        texts = [query + response for query, response in zip(queries, responses, strict=True)]
        outputs = classifier(texts, top_k=None, function_to_apply="none", batch_size=len(texts))
        return [next(entry["score"] for entry in output if entry["label"] == label) for output in outputs]

    return score


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ppo_runtime.demo.classic", description=__doc__)
    defaults = {field.name: field.default for field in attrs.fields(ClassicOptions)}
    for name in ("model", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("reward-model", "prompts"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--label")
    parser.add_argument("--response-length", type=int, nargs=2, metavar=("LEAST", "MOST"), default=(8, 24))
    for name in ("steps", "batch_size", "mini_batch_size", "learning_rate", "rank", "dtype", "save_every", "seed"):
        default = defaults[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    given["response_length"] = tuple(given["response_length"])
    run(ClassicOptions(**given))


if __name__ == "__main__":
    main()
