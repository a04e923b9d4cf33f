"""Old scripts on this trainer: ``python -m tests.old_scripts CHECKOUT [--itrex FILE] [--only WORDS]``.

CHECKOUT is a clone of TRL's public repository at v0.7.11, FILE is rl_training.py of Intel Extension for Transformers.
Nothing of either is kept here. Every script is copied into a temporary directory, changed by the substitutions in
``substitutions.py`` and by nothing else, and run to its end in a process of its own; TRL's own tests of the trainer
likewise, under pytest. Models and datasets are tiny, made on the spot, and lie under the names that the scripts use.

Needs the extras ``test`` and ``peft``, and pandas and parameterized, which the scripts import.
"""
