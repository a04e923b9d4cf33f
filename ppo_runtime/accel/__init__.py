"""What computes the passes of models that never change: eager torch or Intel's extension.

backends  eager torch or Intel's extension for frozen models, and back to eager whatever fails
intel     whether Intel's extension fits here, and its import, apart from transformers
probing   trying once in a process of its own, and remembering the answer
"""
