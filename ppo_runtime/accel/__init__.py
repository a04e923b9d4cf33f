"""What a processor computes faster with: packed weights for models that never change, and memory that is used again.

backends  eager torch or Intel's extension for frozen models, and back to eager whatever fails
heap      freed memory kept for the next pass
onednn    linear layers packed for the length of a rollout
intel     whether Intel's extension fits here, and its import, apart from transformers
probing   trying once in a process of its own, and remembering the answer
"""
