"""What a checkpoint is made of, and whether it and a trainer belong together.

files     the directory: whole or not there
sealing   the manifest: every file's size and SHA-256
fields    kinds of fields, and records made of them
records   what each field may hold
reading   nothing used before it is checked
parts     tensors of which each rank writes and reads its rows
contents  what is written, and read for a trainer
fitting   whether a checkpoint and a trainer belong together
stepping  whether optimiser and scheduler could step on
making    what a run is made with beside weights and settings
keeping   what can be kept, and is worth it
frozen    what training does not touch, by its digests
position  each process's random generators and place in the data
rotation  a run's checkpoints: the newest good one, the ones to remove
"""
