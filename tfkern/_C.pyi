compiler: str
torch_version: str
cpu_levels: tuple[str, ...]

def cpu_capability() -> str: ...
