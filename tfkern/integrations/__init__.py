"""Other libraries' models on tfkern's kernels, and their weights in tfkern's models.

`tfkern.integrations.hf` for transformers, `tfkern.integrations.torch_layers` for torch.nn. Neither
is imported before it is named.
"""
