"""The compiled kernels for CPUs; absent where no compiler was there to build them."""

tile: int
compiler: str

def kernels() -> list[str]:
    """The kernels that run on this machine, the best first."""

def variants() -> list[tuple[str, str]]:
    """Every kernel that was compiled, the best first, and what this machine lacks for it ("" if it runs here)."""

def chosen() -> str:
    """The kernel that is used unless one is named."""

def ceiling(what: str, threads: int) -> float:
    """The most this machine can do: GFLOP/s for "float32" and "bfloat16" (0 without instructions), GB/s for "read"."""

def forward(
    dtype: int,
    q: tuple[int, int, int, int],
    k: tuple[int, int, int, int],
    v: tuple[int, int, int, int],
    out: tuple[int, int, int, int],
    lse: int,
    sizes: tuple[int, int, int, int, int, int, int],
    scale: float,
    softcap: float,
    distances: tuple[int, ...],
    bias: tuple[int, ...],
    sinks: int,
    tiles: tuple[int, int, int, int, int, int],
    kernel: str,
    threads: int,
) -> None:
    """Attention of a call that was checked: addresses and strides in elements; nothing is checked here."""
