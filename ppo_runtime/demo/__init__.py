"""The demo: PPO makes a small language model's prose more cheerful.

options   what the command line can change, and what a resumed run takes over
run       load, look, train, look again, save
standing  how far the run in a directory has come
report    what is said at the end
classic   the classic example: a classifier as reward, LoRA in bfloat16
pretrain  makes the embedded model from six novels

``assets`` holds the embedded model, its tokenizer, prompts and model card.
"""
