"""The processes that train together: who they are, how they agree, gathers, gradients, seeds and random generators.

world       who they are, and the process group in which they meet
presence    where each rank is, so that one that is lost can be named
agreement   what one rank finds wrong, all refuse; facts that must be the same on all
gather      metrics and distributions of all ranks, sums of gradients
parallel    how the ranks share a model in an update
sharded     a model of which every rank holds a part
shards      tensors in parts, and whole ones
seeding     one seed for every generator
generators  random generators: their states, and how they are taken over
"""
