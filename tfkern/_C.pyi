compiler: str
torch_version: str
amd: bool
cpu_levels: tuple[str, ...]
cuda_architectures: tuple[str, ...]
cuda_kernels: tuple[str, ...]
has_cuda: bool

def cpu_capability() -> str: ...
