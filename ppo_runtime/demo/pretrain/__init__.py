"""Make the demo's language model from nothing: six novels in, a small LLaMA with its tokenizer and prompts out.

    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb texts
    python -m ppo_runtime.demo.pretrain --texts texts --output ppo_runtime/demo/assets

The texts are Jane Austen's six finished novels, in the public domain. Whole chapters are held out: the ones whose
number leaves the remainder 8 when divided by 16 (8, 24, 40 and 56, counted through each novel from 1). Nothing
of them reaches the tokenizer or the weights, so the demo's prompts, which are their sentences' openings, ask the
model to continue what it has never seen.

Every batch and every dropout mask is a function of (seed, step) alone. A run that was cut short and finished with
``--resume`` therefore does the same arithmetic as one that was not.

novels    an R package in, chapters out
model     tokenizer and model, and how they are shipped
training  next-token training that can be cut short anywhere
prompts   neutral openings of sentences never seen
card      the model card
"""
