"""TRL's public names and parameters, copied as facts from its API document, and where they are here.

``python -m tests.runtime.api_table`` prints the table. With the path of TRL's API document (in Sphinx's
``.rst``) as argument, the copied facts are compared with the document first.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

import ppo_runtime

REQUIRED = "required"
# (name, default) in order. "**name" stands for keyword arguments.
Parameters = tuple[tuple[str, Any], ...]

TRAINER_API: dict[str, Parameters] = {
    "PPOTrainer": tuple(
        (name, None)
        for name in (
            "config",
            "model",
            "ref_model",
            "tokenizer",
            "dataset",
            "optimizer",
            "data_collator",
            "num_shared_layers",
            "lr_scheduler",
        )
    ),
    "PPOTrainer.prepare_dataloader": (("dataset", REQUIRED), ("data_collator", None)),
    "PPOTrainer.generate": (
        ("query_tensor", REQUIRED),
        ("length_sampler", None),
        ("batch_size", 4),
        ("return_prompt", True),
        ("generate_ref_response", False),
        ("**generation_kwargs", REQUIRED),
    ),
    "PPOTrainer.step": (
        ("queries", REQUIRED),
        ("responses", REQUIRED),
        ("scores", REQUIRED),
        ("response_masks", None),
    ),
    "PPOTrainer.gather_stats": (("stats", REQUIRED),),
    "PPOTrainer.batched_forward_pass": (
        ("model", REQUIRED),
        ("queries", REQUIRED),
        ("responses", REQUIRED),
        ("model_inputs", REQUIRED),
        ("return_logits", False),
        ("response_masks", None),
    ),
    "PPOTrainer.train_minibatch": tuple(
        (name, REQUIRED)
        for name in ("old_logprobs", "values", "logprobs", "logits", "vpreds", "mask", "advantages", "returns")
    ),
    "PPOTrainer.compute_rewards": tuple((name, REQUIRED) for name in ("scores", "logprobs", "ref_logprobs", "masks")),
    "PPOTrainer.loss": tuple(
        (name, REQUIRED)
        for name in ("old_logprobs", "values", "logits", "vpreds", "logprobs", "mask", "advantages", "returns")
    ),
    "PPOTrainer.record_step_stats": (("kl_coef", REQUIRED), ("**data", REQUIRED)),
    "PPOTrainer.log_stats": (
        ("stats", REQUIRED),
        ("batch", REQUIRED),
        ("rewards", REQUIRED),
        ("columns_to_log", ["query", "response"]),
    ),
    "PPOTrainer.create_model_card": (("path", REQUIRED), ("model_name", "TRL Model")),
    "AdaptiveKLController": (("init_kl_coef", REQUIRED), ("target", REQUIRED), ("horizon", REQUIRED)),
    "FixedKLController": (("kl_coef", REQUIRED),),
    "get_global_statistics": (("accelerator", REQUIRED), ("xs", REQUIRED), ("mask", None), ("device", "cpu")),
}
"""Everything that TRL's document of the trainer's module names."""

BESIDE: dict[str, Parameters] = {
    "PPOTrainer.prepare_model_inputs": (("queries", REQUIRED), ("responses", REQUIRED)),
    "PPOTrainer.compute_advantages": (("values", REQUIRED), ("rewards", REQUIRED), ("mask", REQUIRED)),
    "AdaptiveKLController.update": (("current", REQUIRED), ("n_steps", REQUIRED)),
    "FixedKLController.update": (("current", REQUIRED), ("n_steps", REQUIRED)),
    "create_reference_model": (("model", REQUIRED), ("num_shared_layers", None), ("pattern", None)),
    "LengthSampler": (("min_value", REQUIRED), ("max_value", REQUIRED)),
    "LengthSampler.__call__": (),
    "set_seed": (("seed", REQUIRED),),
    "logprobs_from_logits": (("logits", REQUIRED), ("labels", REQUIRED), ("gather", True)),
    "entropy_from_logits": (("logits", REQUIRED),),
    "masked_mean": (("values", REQUIRED), ("mask", REQUIRED), ("axis", None)),
    "masked_var": (("values", REQUIRED), ("mask", REQUIRED), ("unbiased", True)),
    "masked_whiten": (("values", REQUIRED), ("mask", REQUIRED), ("shift_mean", True)),
    "whiten": (("values", REQUIRED), ("shift_mean", True)),
    "clip_by_value": (("x", REQUIRED), ("tensor_min", REQUIRED), ("tensor_max", REQUIRED)),
    "flatten_dict": (("nested", REQUIRED), ("sep", "/")),
    "stack_dicts": (("stats_dicts", REQUIRED),),
    "stats_to_np": (("stats_dict", REQUIRED),),
    "convert_to_scalar": (("stats", REQUIRED),),
    "respond_to_batch": (
        ("model", REQUIRED),
        ("queries", REQUIRED),
        ("txt_len", 20),
        ("top_k", 0),
        ("top_p", 1.0),
    ),
    **{
        f"{wrapper}.{method}": parameters
        for wrapper in (
            "PreTrainedModelWrapper",
            "AutoModelForCausalLMWithValueHead",
            "AutoModelForSeq2SeqLMWithValueHead",
        )
        for method, parameters in {
            "from_pretrained": (
                ("pretrained_model_name_or_path", REQUIRED),
                ("*model_args", REQUIRED),
                ("**kwargs", REQUIRED),
            ),
            "forward": (
                ("input_ids", None),
                ("past_key_values", None),
                ("attention_mask", None),
                ("**kwargs", REQUIRED),
            ),
            "generate": (("*args", REQUIRED), ("**kwargs", REQUIRED)),
        }.items()
    },
}
"""What users of TRL import or call beside it, with the parameters customary there."""

CONFIG: dict[str, Any] = {
    "exp_name": ...,  # the script's name
    "seed": 0,
    "log_with": None,
    "task_name": None,
    "model_name": "gpt2",
    "query_dataset": "imdb",
    "reward_model": "sentiment-analysis:lvwerra/distilbert-imdb",
    "remove_unused_columns": True,
    "tracker_kwargs": {},
    "accelerator_kwargs": {},
    "project_kwargs": {},
    "tracker_project_name": "trl",
    "push_to_hub_if_best_kwargs": {},
    "steps": 20000,
    "learning_rate": 1e-5,
    "adap_kl_ctrl": True,
    "init_kl_coef": 0.2,
    "kl_penalty": "kl",
    "target": 6,
    "horizon": 10000,
    "gamma": 1,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "batch_size": 256,
    "mini_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "ppo_epochs": 4,
    "max_grad_norm": None,
    "optimize_device_cache": False,
    "early_stopping": False,
    "target_kl": 1,
    "compare_steps": 1,
    "ratio_threshold": 10.0,
    "use_score_scaling": False,
    "use_score_norm": False,
    "score_clip": None,
    "whiten_rewards": False,
    "pad_for_acceleration": False,
    "pad_max_len": 0,
    "pad_max_input_len": 0,
    "use_habana": False,
    "is_encoder_decoder": None,
    "is_peft_model": None,
}
DERIVED = (
    "backward_batch_size",
    "global_backward_batch_size",
    "global_batch_size",
    "total_ppo_epochs",
    "world_size",
    "to_dict",
)
ATTRIBUTES = (
    "config",
    "model",
    "ref_model",
    "tokenizer",
    "dataset",
    "dataloader",
    "data_collator",
    "optimizer",
    "lr_scheduler",
    "kl_ctl",
    "current_step",
    "push_to_hub",
    "save_pretrained",
)
"""Attributes of a trainer that examples and users touch; ``kl_ctl.value`` is the coefficient."""

STATISTICS = (
    *(f"objective/{name}" for name in ("kl", "kl_dist", "logprobs", "ref_logprobs", "kl_coef", "entropy")),
    *(f"ppo/{name}" for name in ("mean_non_score_reward", "mean_scores", "std_scores", "learning_rate")),
    *(f"ppo/loss/{name}" for name in ("policy", "value", "total")),
    *(
        f"ppo/policy/{name}"
        for name in ("entropy", "approxkl", "policykl", "clipfrac", "advantages", "advantages_mean", "ratio")
    ),
    *(f"ppo/returns/{name}" for name in ("mean", "var")),
    *(f"ppo/val/{name}" for name in ("vpred", "error", "clipfrac", "mean", "var", "var_explained")),
    *(f"tokens/{side}_{name}" for side in ("queries", "responses") for name in ("len_mean", "len_std", "dist")),
    *(
        f"time/ppo/{name}"
        for name in (
            "forward_pass",
            "compute_rewards",
            "compute_advantages",
            "optimize_step",
            "calc_stats",
            "total",
        )
    ),
)
"""Keys of what ``step`` returns."""

DIFFERENT_DEFAULTS = {
    ("PPOTrainer.create_model_card", "model_name"): "names this project's kind of model",
    ("PPOTrainer.generate", "batch_size"): "takes as many queries together as memory holds",
    ("get_global_statistics", "accelerator"): "may be left out: there is no accelerator",
    ("get_global_statistics", "xs"): "stands in the accelerator's place then",
    ("PPOConfig", "tracker_project_name"): "names no other library",
}
"""Where a default differs, and why."""


def resolve(name: str) -> Any:
    """The object of a dotted name in ``ppo_runtime``; None if it is not there."""
    found: Any = ppo_runtime
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def parameters_of(name: str) -> Parameters:
    """The parameters that a caller of TRL's can use: positional ones and catch-alls, in order."""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return tuple(
        (marks.get(parameter.kind, "") + parameter.name, _default(parameter))
        for parameter in inspect.signature(resolve(name)).parameters.values()
        if parameter.name != "self" and parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    )


def rows() -> Iterator[tuple[str, str, str]]:
    """(name, parameter, verdict) for everything in the tables; the verdict is "same" or begins with "differs"."""
    for name, expected in (TRAINER_API | BESIDE).items():
        if resolve(name) is None:
            yield name, "", "MISSING"
            continue
        present = parameters_of(name)
        if [parameter for parameter, _ in present] != [parameter for parameter, _ in expected]:
            yield name, ", ".join(parameter for parameter, _ in present), "OTHER PARAMETERS"
            continue
        if not expected:
            yield name, "", "same"
        for (parameter, default), (_, ours) in zip(expected, present, strict=True):
            yield name, parameter, _verdict(name, parameter, default, ours)
    fields = attrs.fields_dict(ppo_runtime.PPOConfig)
    for name, default in CONFIG.items():
        if name not in fields:
            yield "PPOConfig", name, "MISSING"
        elif default is ...:
            yield "PPOConfig", name, "same"
        else:
            ours = fields[name].default
            yield "PPOConfig", name, _verdict("PPOConfig", name, default, {} if isinstance(ours, Factory) else ours)
    for name in DERIVED:
        yield "PPOConfig", name, "same" if hasattr(ppo_runtime.PPOConfig, name) else "MISSING"


Factory = type(attrs.Factory(dict))


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.default is inspect.Parameter.empty:
        return REQUIRED
    return list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default


def _verdict(name: str, parameter: str, expected: Any, ours: Any) -> str:
    if expected == ours:
        return "same"
    reason = DIFFERENT_DEFAULTS.get((name, parameter))
    return f"differs: {ours!r} for {expected!r}, {reason}" if reason else f"OTHER DEFAULT: {ours!r} for {expected!r}"


def walk_document(text: str) -> dict[str, Parameters]:
    """Every class, function and method of a Sphinx document with its parameters, annotations left out."""
    found: dict[str, Parameters] = {}
    owner = ""
    for kind, name, signature in re.findall(r"^ *\.\. py:(class|function|method):: ([\w.]+)\((.*)\)", text, re.M):
        signature = re.sub(r" -> .*$", "", signature).removesuffix(")")
        definition = ast.parse(f"def f({signature}): pass").body[0]
        assert isinstance(definition, ast.FunctionDef)
        arguments = definition.args
        missing = [REQUIRED] * (len(arguments.args) - len(arguments.defaults))
        defaults = [*missing, *map(ast.literal_eval, arguments.defaults)]
        parameters = [(argument.arg, default) for argument, default in zip(arguments.args, defaults, strict=True)]
        if arguments.kwarg is not None:
            parameters.append((f"**{arguments.kwarg.arg}", REQUIRED))
        owner = name if kind == "class" else owner
        found[f"{owner}.{name}" if kind == "method" else name] = tuple(parameters)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.runtime.api_table", description="Print the table of names.")
    parser.add_argument("paths", nargs="*", help="documents to compare it with first")
    for path in parser.parse_args().paths:
        document = walk_document(Path(path).read_text(encoding="utf-8"))
        if document != TRAINER_API:
            odd = sorted(key for key in {*document, *TRAINER_API} if document.get(key) != TRAINER_API.get(key))
            sys.exit(f"{path} and the table differ in {', '.join(odd)}")
        print(f"The table holds all {len(document)} names of {path}, with their parameters.\n")
    print("| name | parameter | here |\n| --- | --- | --- |")
    for row in rows():
        print("| {} | {} | {} |".format(*row))
