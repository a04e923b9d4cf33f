"""The processes that train together: gathers, gradients, seeds and random generators.

gather      ranks: one collective for all metrics, one for all distributions
seeding     one seed for every generator
generators  random generators: their states, and how they are taken over
"""
