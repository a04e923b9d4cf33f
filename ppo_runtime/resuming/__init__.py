"""Whether a checkpoint and a trainer belong together.

fitting  whether a checkpoint and a trainer belong together
frozen   what training does not touch, by its digests
"""
