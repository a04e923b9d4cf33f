"""What is changed in the old scripts, and why; a substitution that no longer finds its text stops the run."""

from typing import NamedTuple

IMPORT = "import"
SIZE = "size"
NETWORK = "needs the network"
GPU = "needs a GPU"
TRANSFORMERS = "transformers 5"
DOCUMENTED = "different here, see the migration page"


class Change(NamedTuple):
    """One text put for another."""

    kind: str
    old: str
    new: str
    reason: str = ""


class Script(NamedTuple):
    """One run."""

    name: str
    path: str
    """In the checkout; "" for the file given by --itrex."""
    changes: tuple[Change, ...]
    arguments: tuple[str, ...] = ()


_FROM_TRL = Change(IMPORT, "from trl", "from ppo_runtime.compat")
_ITREX = "from intel_extension_for_transformers.transformers"
_ALL_SCORES = Change(
    TRANSFORMERS,
    '"return_all_scores": True',
    '"top_k": None',
    "pipelines ignore return_all_scores and give the best label alone; top_k=None gives all",
)
_SECOND_LABEL = Change(
    TRANSFORMERS,
    'output[1]["score"]',
    'next(label["score"] for label in output if label["label"] == "POSITIVE")',
    "top_k=None orders labels by score, not by number",
)
_ALL_OF_ONE = Change(
    TRANSFORMERS,
    '"return_all_scores": True,',
    '"top_k": None,',
    "as above",
)
_CPU = Change(GPU, '{"": current_device}', '{"": "cpu"}', "process 0's device would be GPU 0")
_NO_8BIT = Change(GPU, "load_in_8bit=True,", "", "bitsandbytes needs a GPU")
_ONE_PROCESS = Change(SIZE, "num_proc = 24", "num_proc = 1")
_FEW_TOKENS = Change(SIZE, '"max_new_tokens": 32', '"max_new_tokens": 4')
_SHORT = Change(SIZE, "LengthSampler(output_min_length, output_max_length)", "LengthSampler(3, 6)")

_PPO = ("--model_name", "lvwerra/gpt2-imdb", "--batch_size", "4", "--mini_batch_size", "2", "--ppo_epochs", "1")
_STACK = (
    *("--model_name", "huggyllama/llama-7b", "--tokenizer_name", "huggyllama/llama-7b"),
    *("--reward_model_name", "reward-model", "--batch_size", "4", "--mini_batch_size", "2"),
    *("--gradient_accumulation_steps", "2", "--ppo_epochs", "1", "--save_freq", "1", "--output_dir", "stack/"),
)
_NOTEBOOK = Change(
    SIZE, "learning_rate=1.41e-5,", "learning_rate=1.41e-5, batch_size=4, mini_batch_size=2, ppo_epochs=1,"
)

SCRIPTS = (
    Script("hello_world.py", "examples/hello_world.py", (_FROM_TRL,)),
    Script(
        "ppo.py",
        "examples/scripts/ppo.py",
        (_FROM_TRL, _ALL_SCORES, _SECOND_LABEL, _FEW_TOKENS),
        _PPO,
    ),
    Script(
        "ppo.py --use_peft",
        "examples/scripts/ppo.py",
        (
            _FROM_TRL,
            _ALL_SCORES,
            _SECOND_LABEL,
            _FEW_TOKENS,
            Change(GPU, '{"": Accelerator().local_process_index}', '{"": "cpu"}', "as above"),
        ),
        (*_PPO, "--use_peft"),
    ),
    Script(
        "ppo_multi_adapter.py",
        "examples/scripts/ppo_multi_adapter.py",
        (
            _FROM_TRL,
            Change(
                GPU,
                '{"": "xpu:0"} if is_xpu_available() else {"": "npu:0"} if is_npu_available else {"": 0}',
                '{"": "cpu"}',
                "(is_npu_available is never called there)",
            ),
            Change(GPU, "    quantization_config=nf4_config,\n", "", "bitsandbytes needs a GPU"),
            Change(
                TRANSFORMERS,
                "    use_safetensors=script_args.use_safetensors,\n",
                "",
                "use_safetensors=False refuses safetensors, in which everything is saved now",
            ),
            _FEW_TOKENS,
            Change(SIZE, 'split="train[:1%]"', 'split="train[:2%]"'),
        ),
    ),
    Script(
        "stack_llama/rl_training.py",
        "examples/research_projects/stack_llama/scripts/rl_training.py",
        (
            _FROM_TRL,
            _ALL_OF_ONE,
            _CPU,
            _NO_8BIT,
            Change(GPU, '    model_kwargs={"load_in_8bit": True},\n', "", "bitsandbytes needs a GPU"),
            Change(SIZE, "range(100000)", "range(8)"),
            _ONE_PROCESS,
            _SHORT,
        ),
        _STACK,
    ),
    Script(
        "toxicity/gpt-j-6b-toxicity.py",
        "examples/research_projects/toxicity/scripts/gpt-j-6b-toxicity.py",
        (
            _FROM_TRL,
            Change(SIZE, "ppo_epochs=100", "ppo_epochs=1"),
            Change(SIZE, "num_shared_layers=20", "num_shared_layers=2"),
            Change(SIZE, "output_min_length = 20", "output_min_length = 3"),
            Change(SIZE, "output_max_length = 30", "output_max_length = 6"),
        ),
        ("--batch_size", "4", "--mini_batch_size", "2"),
    ),
    Script(
        "gpt2-sentiment.ipynb",
        "examples/notebooks/gpt2-sentiment.ipynb",
        (
            _FROM_TRL,
            _ALL_SCORES,
            _SECOND_LABEL,
            _NOTEBOOK,
            Change(SIZE, "bs = 16", "bs = 4"),
            Change(NETWORK, ", push_to_hub=True", ""),
        ),
    ),
    Script(
        "gpt2-sentiment-control.ipynb",
        "examples/notebooks/gpt2-sentiment-control.ipynb",
        (
            _FROM_TRL,
            _NOTEBOOK,
            Change(SIZE, "txt_out_len = 20", "txt_out_len = 4"),
            Change(
                DOCUMENTED,
                'logs["env/reward_dist"]',
                "[float(reward) for reward in rewards]",
                "the notebook fills logs nowhere: it fails on the old trainer too",
            ),
        ),
    ),
    Script(
        "ITREX rl_training.py",
        "",
        (
            Change(IMPORT, f"{_ITREX}.ppo_core", "from ppo_runtime"),
            Change(IMPORT, f"{_ITREX}.ppo_config", "from ppo_runtime"),
            Change(IMPORT, f"{_ITREX}.ppo_trainer", "from ppo_runtime"),
            Change(
                IMPORT, "from intel_extension_for_transformers.transformers.modeling.trl_models", "from ppo_runtime"
            ),
            _ALL_OF_ONE,
            _ONE_PROCESS,
            _SHORT,
            Change(
                TRANSFORMERS,
                '            "use_auth_token": script_args.hf_access_token,\n',
                "",
                "the argument is called token",
            ),
        ),
        _STACK,
    ),
)

DOCUMENTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "quickstart": ("docs/source/quickstart.mdx", (0, 1)),
    "ppo_trainer": ("docs/source/ppo_trainer.mdx", (0, 2, 3, 4, 5, 6, 7, 8)),
    "customization: optimizer": ("docs/source/customization.mdx", (1,)),
    "customization: lr_scheduler": ("docs/source/customization.mdx", (4,)),
    "customization: shared layers": ("docs/source/customization.mdx", (5,)),
    "lora_tuning_peft": ("docs/source/lora_tuning_peft.mdx", (0,)),
}
"""The documentation's Python blocks, by their numbers, that make up a program."""

DOCUMENT_CHANGES: dict[str, tuple[Change, ...]] = {
    "quickstart": (Change(NETWORK, 'model.push_to_hub("my-fine-tuned-model-ppo")', ""),),
    "ppo_trainer": (
        Change(IMPORT, "import load_dataset", "import load_dataset\nimport torch", "never imported there"),
        _NOTEBOOK,
        Change(
            DOCUMENTED,
            "dataset = dataset.map(tokenize, batched=False)",
            'dataset = dataset.map(tokenize, batched=False)\ndataset.set_format("torch")',
            "the page forgets it: rows would be lists, which the old trainer takes neither",
        ),
        Change(SIZE, '"do_sample": True,', '"do_sample": True, "max_new_tokens": 4,'),
        Change(
            TRANSFORMERS, "reward_model(texts)", "reward_model(texts, top_k=None)", "all labels, not the best alone"
        ),
        _SECOND_LABEL,
        Change(
            DOCUMENTED,
            "ppo_trainer.generate(query_tensors, **",
            "ppo_trainer.generate(query_tensors, return_prompt=False, **",
            "the page trains on the prompt as if it were the response",
        ),
        Change(
            DOCUMENTED, "ppo_trainer.save_model(", "ppo_trainer.save_pretrained(", "the old trainer has none either"
        ),
    ),
}

TESTS: dict[str, tuple[Change, ...]] = {
    "test_ppo_trainer.py": (
        _FROM_TRL,
        Change(TRANSFORMERS, "HfApi, HfFolder, delete_repo", "HfApi, delete_repo", "huggingface_hub 1 has no HfFolder"),
        Change(TRANSFORMERS, "        HfFolder.save_token(CI_HUB_USER_TOKEN)\n", "", "likewise"),
        Change(NETWORK, "except HTTPError", "except Exception"),
    ),
    "test_modeling_value_head.py": (
        _FROM_TRL,
        Change(
            TRANSFORMERS,
            '    "trl-internal-testing/tiny-random-FSMTForConditionalGeneration",\n    "',
            '    "',
            "FSMT has no fast tokenizer or safetensors to stand in for",
        ),
    ),
    "test_core.py": (_FROM_TRL,),
    "test_no_peft.py": (_FROM_TRL,),
    "test_peft_models.py": (_FROM_TRL,),
    "testing_utils.py": (_FROM_TRL,),
}
"""TRL's tests of the trainer and its models."""

EXPECTED_FAILURES = {
    "PPOTrainerTester.test_drop_last_dataloader": "a dataset with less than one batch is refused: its empty dataloader "
    "would train nothing",
    "PPOTrainerTester.test_loss_trainer": "unpacks three tensors from compute_rewards, which gives two here as in "
    "Intel's document; return_kls=True adds the third",
    "PPOTrainerTester.test_ppo_step_no_dataset": "wants a warning where no dataset is given; that is a documented use "
    "here, and every step checks the number of its rows",
    "PPOTrainerTester.test_ppo_step_with_no_ref_sgd": "asks for trainer.optimizer.optimizer, accelerate's wrapper; "
    "nothing wraps the optimiser here",
    "PPOTrainerTester.test_ppo_step_with_no_ref_sgd_lr_scheduler": "likewise",
    "PeftModelTester.test_save_pretrained_peft": "looks for pytorch_model.bin; the head has its own file",
}
"""TRL's tests that fail here, and why that is right."""
