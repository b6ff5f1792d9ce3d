"""Models of other libraries on tfkern's kernels, and their weights in tfkern's models.

`tfkern.integrations.hf` serves transformers, `tfkern.integrations.torch_layers` torch.nn. Neither
is imported before it is named.
"""
