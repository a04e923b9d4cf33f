"""``python -m ppo_runtime.demo``: the demo by itself."""

from ppo_runtime.cli import demo_main

demo_main()
