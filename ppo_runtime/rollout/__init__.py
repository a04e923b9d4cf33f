"""From prompts to responses.

generating  responses, with settings checked and warned about
engine      batched generation, each response as long as it was
ending      where rows end: EOS, strings, criteria
settings    the settings of generation that are in force, checked
values      what the value of each has to be
sampling    which of them sample from another distribution
drawn       which responses generate returned lately, and whether they were sampled
prompts     prompts in the data and in a batch, checked
data        the prompts' dataloader
room        how long a prompt may be beside the response asked for
"""
