"""Language models with a value head: the policy and its critic on one trunk."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from ppo_runtime.models.hub import take_upload, upload
from ppo_runtime.models.inner import cache_argument, is_compiled, is_peft_model, transformers_model
from ppo_runtime.models.loading import add_adapter, hub_arguments, load_stored, unmet
from ppo_runtime.models.precision import computing
from ppo_runtime.models.saving import save
from ppo_runtime.models.value_head import HEAD_PREFIX, INNER_PREFIX, ValueHead, check_head
from ppo_runtime.ranks.shards import is_shard

if TYPE_CHECKING:
    from ppo_runtime.models.reward_adapter import RewardAdapter

WrapperT = TypeVar("WrapperT", bound="PreTrainedModelWrapper")

_COMPILED = "; pass it as it was before torch.compile"


class PreTrainedModelWrapper(nn.Module):
    """A transformers or PEFT model as `pretrained_model` and a `ValueHead` as `v_head`.

    The state dict is that of the inner model plus `v_head.*`: no prefix on the inner names, and
    `load_state_dict` takes them with or without `pretrained_model.`.
    """

    transformers_parent_class: ClassVar[Any]
    supported_args: ClassVar[tuple[str, ...]] = (
        "summary_dropout_prob",
        "v_head_initializer_range",
        "v_head_init_strategy",
    )
    lm_head_namings: ClassVar[tuple[str, ...]] = ("lm_head", "embed_out")
    """Not read here: any head that ``get_output_embeddings`` finds will do."""
    _encoder_decoder: ClassVar[bool]
    _hidden_states: ClassVar[str]

    def __init__(
        self,
        pretrained_model: Any,
        *,
        summary_dropout_prob: float | None = None,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
    ) -> None:
        """Wrap a model. The head's weights are Linear's default, or N(0, range) with strategy "normal"."""
        super().__init__()
        self._check(pretrained_model)
        self.pretrained_model = pretrained_model
        self.reward_adapter: RewardAdapter | None = None
        self.v_head = ValueHead(pretrained_model.config, summary_dropout_prob=summary_dropout_prob)
        number = isinstance(v_head_initializer_range, int | float) and math.isfinite(v_head_initializer_range)
        if not (number and v_head_initializer_range >= 0):
            raise ValueError(f"v_head_initializer_range is {v_head_initializer_range!r}, expected a number from 0")
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.v_head.summary.weight, mean=0.0, std=v_head_initializer_range)
            nn.init.zeros_(self.v_head.summary.bias)
        elif v_head_init_strategy is not None:
            raise ValueError(f"v_head_init_strategy is {v_head_init_strategy!r}, expected 'normal' or None")
        self.v_head.to(transformers_model(pretrained_model).get_output_embeddings().weight.device)
        # transformers hands models over in eval mode; the head must not be the one part that trains.
        self.training = transformers_model(pretrained_model).training
        self.v_head.train(self.training)

    @classmethod
    def from_pretrained(
        cls: type[WrapperT], pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> WrapperT:
        """Wrap a hub name, a directory, a transformers model or a PEFT model.

        The head is read from the directory or repository where one is stored, else initialised. A directory
        holding a PEFT adapter is loaded onto the base model it names, whose head will do where it has none of its own.
        `peft_config` adds a fresh adapter;
        `is_trainable=False` loads a stored one frozen. `reward_adapter`, a sequence-classification adapter, is put
        beside it for `compute_reward_score`. `supported_args` go to the head and everything else to
        transformers' `from_pretrained`; `load_in_8bit` and `load_in_4bit` become a `BitsAndBytesConfig`.

        Weights are float32 unless `dtype` says otherwise, whatever they are stored in ("auto" keeps that); quantised
        ones are as their configuration has them. A policy that trains in half precision is widened by the trainer, see
        `ppo_runtime.models.precision`; a frozen base under an adapter, or a reference, may well be half.
        """
        head_args = {name: kwargs.pop(name) for name in cls.supported_args if name in kwargs}
        peft_config = kwargs.pop("peft_config", None)
        reward_adapter = kwargs.pop("reward_adapter", None)
        reward_adapter_name = kwargs.pop("reward_adapter_name", "reward_model_adapter")
        is_trainable = kwargs.pop("is_trainable", True)
        if kwargs.pop("output_loading_info", False):
            raise ValueError(
                f"output_loading_info is True, which would give a pair, and {cls.__name__}.from_pretrained gives a "
                f"model; load with transformers.{cls.transformers_parent_class.__name__} to have that report, and pass "
                "the model it gives"
            )
        source, stored = pretrained_model_name_or_path, None
        if isinstance(source, str | os.PathLike):
            model, stored = load_stored(
                source, cls.transformers_parent_class, cls._check_config, model_args, kwargs, is_trainable=is_trainable
            )
        elif isinstance(source, PreTrainedModel | PreTrainedModelWrapper) or is_peft_model(source):
            cls._check(source)
            # Where files come from says nothing about weights that are here; a reward adapter may need it.
            unused = [name for name in unmet(kwargs) if name not in ("trust_remote_code", *hub_arguments(kwargs))]
            if model_args or unused:
                raise TypeError(
                    f"a {type(source).__name__} that is already loaded takes no loading arguments, got "
                    f"{', '.join([*map(repr, model_args), *unused])}; apply them where you load the model"
                )
            model = source
        else:
            raise TypeError(
                f"pretrained_model_name_or_path is a {type(source).__name__}, expected a name, a directory, "
                f"a transformers PreTrainedModel or a peft PeftModel{_COMPILED if is_compiled(source) else ''}"
            )
        if peft_config is not None:
            if is_peft_model(model):
                raise ValueError("the model already has a PEFT adapter; leave peft_config out or pass the base model")
            cls._check(model)
            model = add_adapter(model, peft_config)
        wrapper = cls(model, **head_args)
        if stored is not None and stored.head:
            check_head(stored.head, wrapper.v_head, stored.file)
            wrapper.v_head.load_state_dict(stored.head)
        if reward_adapter is not None:
            from ppo_runtime.models.reward_adapter import add_reward_adapter

            hub = hub_arguments({key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")})
            wrapper.reward_adapter = add_reward_adapter(model, reward_adapter, reward_adapter_name, **hub)
        return wrapper

    @classmethod
    def _check_config(cls, config: Any, what: str) -> None:
        if bool(getattr(config, "is_encoder_decoder", False)) == cls._encoder_decoder:
            return
        kinds = {True: "an encoder-decoder", False: "a decoder-only model"}
        other = AutoModelForCausalLMWithValueHead if cls._encoder_decoder else AutoModelForSeq2SeqLMWithValueHead
        raise ValueError(
            f"{what} (model_type {config.model_type!r}) is {kinds[not cls._encoder_decoder]}, but {cls.__name__} "
            f"expects {kinds[cls._encoder_decoder]}; use {other.__name__} for it"
        )

    @classmethod
    def _check(cls, model: Any) -> None:
        if isinstance(model, PreTrainedModelWrapper):
            raise TypeError(f"got a {type(model).__name__}, which has its value head already; use it as it is")
        inner = transformers_model(model)
        if not isinstance(inner, PreTrainedModel):
            hint = _COMPILED if is_compiled(inner) else ""
            raise TypeError(
                f"got a {type(inner).__name__}, expected a transformers PreTrainedModel or a peft PeftModel{hint}"
            )
        cls._check_config(inner.config, type(inner).__name__)
        if inner.get_output_embeddings() is None:
            raise ValueError(
                f"{type(inner).__name__} has no language-model head, which {cls.__name__} expects; load it with "
                f"transformers.{cls.transformers_parent_class.__name__}.from_pretrained"
            )

    def _check_whole(self, instead: str) -> None:
        """Refuse what needs all weights where this process has a part of them."""
        if is_shard(transformers_model(self).get_input_embeddings().weight):
            raise ValueError(
                "the model is divided among ranks (parallelism='fsdp2'), and none of them has all of it; call the "
                f"trainer's {instead} on every rank"
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(lm_logits [B, L, V], loss or None, value [B, L]); logits and values in float32.

        The loss is the model's own and needs `labels`. For an encoder-decoder L is the decoder's length, and
        `decoder_input_ids` come by keyword. A cache may be given as `past_key_values` or, its newer name, `cache`.
        """
        self._check_whole("step, or, without gradient, batched_forward_pass")
        given = kwargs.pop("cache", None)
        if given is not None and past_key_values is not None:
            raise ValueError("got both cache and past_key_values, which are two names of one argument; pass one")
        if (cache := past_key_values if given is None else given) is None:
            kwargs.setdefault("use_cache", False)  # a cache would not be returned, so why fill one
        else:
            kwargs[cache_argument(self)] = cache
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        with computing(self):
            output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        value = self.v_head(output[self._hidden_states][-1]).squeeze(-1)
        logits = output.logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), output.loss, value

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The inner model's `generate`."""
        self._check_whole("generate")
        with computing(self, weights_stay=True):
            return self.pretrained_model.generate(*args, **kwargs)

    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """Scores [B, L, labels] of the reward adapter at every position; the last token's is the text's score."""
        if self.reward_adapter is None:
            raise ValueError("the model has no reward adapter; pass reward_adapter= to from_pretrained")
        from ppo_runtime.models.reward_adapter import reward_scores

        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return reward_scores(self, self.reward_adapter, input_ids, mask)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write a directory that plain transformers (or PEFT) loads, with the head in a file of its own.

        `state_dict` may be given in the layout of `self.state_dict()`; one without `v_head.*`, such as the inner
        model's own, goes with the head as it is. `push_to_hub=True` uploads it afterwards, to `repo_id` or else a
        repository of the directory's name, with the arguments of `push_to_hub`. The other arguments are the inner
        model's.

        Raises:
            ValueError: part of the head is missing from `state_dict`, or the whole of the model.
        """
        if (uploading := take_upload(kwargs, save_directory)) is not None:
            self.save_pretrained(save_directory, **kwargs)
            if kwargs.get("is_main_process", True):
                self.push_to_hub(**uploading, **kwargs)
            return
        if kwargs.get("state_dict") is None:
            self._check_whole("save_pretrained")
        save(self, save_directory, kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload model and value head",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_description: str | None = None,
        use_temp_dir: bool | None = None,
        **save_kwargs: Any,
    ) -> Any:
        """Upload what `save_pretrained` writes; returns huggingface_hub's commit information.

        With `use_temp_dir=False` it is written to a directory of the repository's name, which stays.
        """
        return upload(
            partial(self.save_pretrained, **save_kwargs),
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_description=commit_description,
            use_temp_dir=use_temp_dir,
        )

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The inner model's state under its own names, and the head's under `v_head.`."""
        inner = {"destination": destination, "prefix": prefix, "keep_vars": keep_vars}
        destination = self.pretrained_model.state_dict(**inner)
        self.v_head.state_dict(destination=destination, prefix=prefix + HEAD_PREFIX, keep_vars=keep_vars)
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # torch calls this before it visits the children, on a copy of the caller's dict.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if not name.startswith((HEAD_PREFIX, INNER_PREFIX)):
                state_dict[prefix + INNER_PREFIX + name] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations in backward; in force in the trainer's updates, in whichever mode the model is."""
        model = transformers_model(self)
        # The older name warns in recent releases of transformers, and the newer is missing from early ones.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs or {"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        model = transformers_model(self)
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()

    @property
    def is_peft_model(self) -> bool:
        """Whether the inner model is a peft PeftModel."""
        return is_peft_model(self.pretrained_model)

    @property
    def config(self) -> Any:
        """The inner transformers model's configuration."""
        return transformers_model(self).config

    @property
    def device(self) -> torch.device:
        """Where the inner model's parameters lie."""
        return transformers_model(self).device

    @property
    def current_device(self) -> torch.device:
        """The device, by TRL's name."""
        return self.device


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A decoder-only language model with a value head."""

    transformers_parent_class = AutoModelForCausalLM
    _encoder_decoder = False
    _hidden_states = "hidden_states"


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder language model with a value head on its decoder."""

    transformers_parent_class = AutoModelForSeq2SeqLM
    _encoder_decoder = True
    _hidden_states = "decoder_hidden_states"

    @property
    def is_encoder_decoder(self) -> bool:
        """True. A decoder-only wrapper has no such attribute: scripts ask by `hasattr(model, "is_encoder_decoder")`."""
        return True
