"""A transformers model as policy, critic, reference and reward model.

wrapper         language models with a value head
value_head      the head, and where it lives on disk
inner           the transformers model inside wrapper and adapter
loading         names, dtypes, quantisation, adapters
saving          what plain transformers loads, and the head beside it
heads           trunk and LM head apart
bottom          frozen bottom layers, run once for many passes
sharing         how ranks share a policy and its reference
units           the parts of a model that are gathered one by one
description     what a model computes beside its weights, as plain facts
packing         rows end to end, without padding
references      frozen copies, shared layers, adapter off
own_reference   whether a policy without its adapter will do for a reference
reward_adapter  a reward model as a second adapter
stand_ins       another forward pass for layers, for the length of a block
modes           dropout off, and every flag back afterwards
precision       float32 weights for a half-precision policy
devices         where models live; mixtures are named
context         how long prompts and responses may be
hub             uploads
gguf            GGUF to safetensors
"""
