"""Peak memory of one step: ``python -m tests.benchmarks.step_memory --model DIR [--batch 16] [--response 128]``.

Every row is a process of its own, which loads the policy and its reference, makes one step, and reports its peak
resident size before and after, and the largest tensor that an operation of the step made (other than one shaped like
the weights). "fused" is what `step` does, which keeps ``--kept-mib`` of logits at most from a forward to its backward
pass; "dense" takes the logits of all tokens of a pass at once. Responses are of random length up to ``--response``,
prompts of 8 to 24 random tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.learning import forward
from ppo_runtime.models.heads import LMHead, logits_at
from tests.benchmarks.step.worker import peak_mib
from tests.operations import Operations
from tests.runtime.support.tiny import tiny_tokenizer


def dense(hidden: Any, weight: Any, tokens: Any, bias: Any, *, softcap: Any, scale: Any, **_: Any) -> Any:
    """The head as it is usually written."""
    logp = logits_at(LMHead(weight, bias, softcap, scale), hidden).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return SimpleNamespace(logprobs=logp.gather(-1, tokens[:, None])[:, 0], entropy=entropy)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One step in this process."""
    torch.manual_seed(0)
    forward.KEPT_LOGITS["cpu"] = options.kept_mib * 2**20
    if options.head == "dense":
        forward.fused_logprobs = dense
        forward.SCORING_TOKENS["cpu"] = 10**9
    model = AutoModelForCausalLMWithValueHead.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    config = PPOConfig(
        batch_size=options.batch, mini_batch_size=options.mini_batch, ppo_epochs=options.epochs, accel="eager"
    )
    trainer = PPOTrainer(config, model, None, tiny_tokenizer())
    lengths = torch.randint(8, 25, (options.batch,)).tolist()
    queries = [torch.randint(3, model.config.vocab_size, (length,)) for length in lengths]
    lengths = torch.randint(options.response // 2, options.response + 1, (options.batch,)).tolist()
    lengths[0] = options.response
    responses = [torch.randint(3, model.config.vocab_size, (length,)) for length in lengths]
    loaded, started = peak_mib(), time.perf_counter()
    with Operations() as operations:
        trainer.step(queries, responses, [torch.tensor(float(i % 3)) for i in range(options.batch)])
    largest = operations.largest(*{tuple(parameter.shape) for parameter in model.parameters()})
    weights = sum(parameter.numel() * 4 for parameter in model.parameters()) / 2**20
    return {
        "head": options.head,
        "seconds": round(time.perf_counter() - started, 1),
        "loaded_mib": round(loaded),
        "peak_mib": round(peak_mib()),
        "weights_mib": round(weights),
        "largest_tensor_mib": round(largest.numel * 4 / 2**20),
        "largest_tensor": f"{tuple(largest.shape)} by {largest.operator}",
        "logits_of_the_batch_mib": round(options.batch * options.response * model.config.vocab_size * 4 / 2**20),
    }


def main() -> None:
    """Print one JSON line per head."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.step_memory", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    for name, default in {"batch": 16, "mini-batch": 4, "response": 128, "epochs": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kept-mib", type=int, default=forward.KEPT_LOGITS["cpu"] // 2**20)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="that the policy comes in")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward passes")
    parser.add_argument("--head", choices=("fused", "dense"), help="measure this one, in this process")
    options = parser.parse_args()
    if options.head is not None:
        print(json.dumps(measure(options)))
        return
    for head in ("fused", "dense"):
        command = [sys.executable, "-m", "tests.benchmarks.step_memory", *sys.argv[1:], "--head", head]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
