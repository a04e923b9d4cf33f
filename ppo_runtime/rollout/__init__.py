"""From prompts to responses.

generating  responses, with settings checked and warned about
batching    how many prompts are answered together, and in which order
lengths     how long each response may become, and whether there is room
plan        what the batches of a call have in common
engine      batched generation, each response as long as it was
decoding    token by token by the model's forward pass, for plain ways to choose a token
obstacles   what decoding leaves to transformers
drawing     tokens from scores, the same however rows are batched
ending      where rows end: EOS, strings, criteria
settings    the settings of generation that are in force, checked
values      what the value of each has to be
sampling    which of them sample from another distribution
drawn       which responses generate returned lately, and whether they were sampled
prompts     prompts in the data and in a batch, checked
data        the prompts' dataloader
digest      by which a run knows its prompts again
room        how long a prompt may be beside the response asked for
"""
