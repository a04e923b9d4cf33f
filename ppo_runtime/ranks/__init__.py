"""The processes that train together: gathers, gradients, seeds and random generators.

gather      metrics and distributions of all ranks, sums of gradients, agreements
parallel    how the ranks share a model in an update
seeding     one seed for every generator
generators  random generators: their states, and how they are taken over
"""
