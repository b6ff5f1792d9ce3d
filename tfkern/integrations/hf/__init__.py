"""Runs models of the library transformers on tfkern's kernels, without changing their code.

hf.register()
model = AutoModel.from_pretrained(name, attn_implementation="tfkern")
hf.patch(model)  # norms, MLPs and rotary positions, too
"""

from tfkern.integrations.hf.attention import attention_forward, register
from tfkern.integrations.hf.patch import Patch, patch

__all__ = ["Patch", "attention_forward", "patch", "register"]
