"""What tests compile."""

import torch


def compiled(fn, backend, **options):
    """A whole function under torch.compile. Inductor takes long over plain PyTorch, which is no
    business of ours: what calls the reference is only traced."""
    compiler = "aot_eager" if backend == "reference" else "inductor"
    return torch.compile(fn, fullgraph=True, backend=compiler, **options)
