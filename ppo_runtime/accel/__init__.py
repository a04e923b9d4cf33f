"""What a processor computes faster with: packed weights, other products of matrices, memory that is used again.

backends  eager torch or another backend for frozen models, and back to eager whatever fails
compiled  a frozen model's layers through torch.compile, with the model's own weights
heap      freed memory kept for the next pass
onednn    linear layers packed for the length of a rollout
products  matrix products by oneDNN, forward and backward, for what trains
intel     whether Intel's extension fits here, and its import, apart from transformers
probing   trying once in a process of its own, and remembering the answer
"""
