"""The README.md beside a saved policy. Made from a template, without network, and never silently left out."""

from pathlib import Path

import attrs

from ppo_runtime import __version__
from ppo_runtime.common.files import write_whole
from ppo_runtime.common.redact import plain_settings
from ppo_runtime.common.wording import counted
from ppo_runtime.config import PPOConfig

MARK = "<!-- Written by ppo_runtime at every save. Remove this line to keep a text of your own. -->"
# What shaped the policy, in the order of the table; the other settings follow where they are not the defaults.
_ALWAYS = ("learning_rate", "batch_size", "mini_batch_size", "ppo_epochs", "init_kl_coef", "target", "gamma", "lam")
# What says nothing about the policy, or should not be published.
_PRIVATE = frozenset(
    {
        "exp_name",
        "log_with",
        "tracker_kwargs",
        "tracker_project_name",
        "project_kwargs",
        "push_to_hub_if_best_kwargs",
        "model_name",
        "query_dataset",
        "reward_model",
        "is_encoder_decoder",
        "is_peft_model",
    }
)


def is_ours(directory: str | Path) -> bool:
    """Whether the card in a directory may be written: there is none, or it carries our mark."""
    card = Path(directory) / "README.md"
    return not card.exists() or (card.is_file() and MARK.encode() in card.read_bytes())  # another's may be in any code


def write_model_card(
    directory: str | Path,
    name: str,
    *,
    config: PPOConfig,
    base_model: str | None,
    is_encoder_decoder: bool,
    steps: int,
    broken_off: str | None = None,
) -> Path:
    """Write README.md into a directory, which is made if need be, and return its path.

    ``base_model`` is named if it is a repository's name; a local directory is not, since it means nothing elsewhere.
    """
    base = base_model if base_model and not Path(base_model).exists() and base_model.count("/") <= 1 else None
    auto_class = "AutoModelForSeq2SeqLMWithValueHead" if is_encoder_decoder else "AutoModelForCausalLMWithValueHead"
    partly = f" and a part of another: {broken_off}" if broken_off else ""
    header = ["tags:", "- ppo", "- reinforcement-learning", "- value-head"]
    if base:
        header.append(f"base_model: {base}")
    done = counted(steps, "step")
    text = f"""---
{chr(10).join(header)}
---
{MARK}

# {name}

A language model{f", based on {base}," if base else ""} trained with Proximal Policy Optimization: responses were
scored, and a penalty on the KL divergence kept the policy close to the model it started from. After {done} of
{counted(config.batch_size, "sequence")}{_ranks(config)}{partly}. The value head that was trained beside it lies in
`value_head.safetensors`.

## Use

```python
from transformers import AutoTokenizer

from ppo_runtime import {auto_class}

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto_class}.from_pretrained("{name}")

prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

With a `PPOTrainer` around it, training goes on from here.

## Training

{_settings(config)}

Made with ppo_runtime {__version__}.
"""
    path = Path(directory) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


def _ranks(config: PPOConfig) -> str:
    return f" on each of {config.world_size} ranks" if config.world_size > 1 else ""


def _settings(config: PPOConfig) -> str:
    defaults = {field.name: field.default for field in attrs.fields(PPOConfig)}
    values = plain_settings(config)
    # A subclass's own settings may be anything, and are not published.
    changed = [name for name in defaults if name not in _PRIVATE and values[name] != defaults[name]]
    rows = [*_ALWAYS, *(name for name in changed if name not in _ALWAYS)]
    return "\n".join(["| setting | value |", "| --- | --- |", *(f"| {name} | {values[name]} |" for name in rows)])
