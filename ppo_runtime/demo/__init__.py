"""The demo: PPO makes a small language model's prose more cheerful."""
