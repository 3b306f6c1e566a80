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

def share_threads_of(library: str) -> bool:
    """Use the threads of an OpenMP runtime that is loaded already; whether that can be."""

# Nothing is checked here: addresses, strides in elements, sizes. `forward`, `backward` and `looked` all take first what
# `foveate.softmax.native` makes of a call: dtype, q, k, v, out, lse, sizes, scale, pages, soft-cap, distances, bias,
# sinks, seed, dropout, reach, tiles, lists, the kernel's name and the number of threads.

def forward(*call: object) -> None:
    """Fill out and lse."""

def backward(*call: object) -> None:
    """Then d_out, d_lse, (dq, dk, dv), (d_bias, its sizes), (d_distances, its batch rows); fills the gradients."""

def linear(*call: object) -> None:
    """What `foveate.linear.native` makes of a call of its own; fills out, the last state, and those that are kept."""

def linear_backward(*call: object) -> None:
    """The same, then d_out, d_last, the addresses of (dq, dk, dv, d_decay, d_beta, d_state), slices; fills those."""

def looked(*call: object) -> None:
    """Then how many keys to keep, indices, weights, (rest, entropy, received); fills them and lse."""
