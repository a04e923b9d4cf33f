"""What a checkpoint is made of, and whether it and a trainer belong together.

files     the directory: whole or not there
fitting   whether a checkpoint and a trainer belong together
keeping   what can be kept, and is worth it
frozen    what training does not touch, by its digests
position  each process's random generators and place in the data
"""
