"""``python -m ppo_runtime``."""

from ppo_runtime.cli import main

main()
