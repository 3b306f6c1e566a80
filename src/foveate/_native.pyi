"""The compiled kernels for CPUs; absent where no compiler was there to build them."""

tile: int
compiler: str

def kernels() -> list[str]:
    """The kernels that run on this machine, the best first."""

def chosen() -> str:
    """The one that runs where none is named: not always the first, since some instructions do not pay everywhere."""

def share_threads_of(library: str) -> bool:
    """Use the threads of an OpenMP runtime that is loaded already; whether that can be."""

def ceiling(what: str, threads: int) -> float:
    """The most this machine can do: GFLOP/s for "float32" and "bfloat16" (0 without instructions), GB/s for "read"."""

# A call that was checked: addresses and strides in elements, in the order of `foveate.softmax.native._Call.arguments`;
# nothing is checked here.

def forward(*call: object) -> None:
    """Attention: fills `out` and `lse`."""

def backward(*call: object) -> None:
    """The gradients of a call: after its own arguments those of `foveate.softmax.native._backward`."""

def looked(*call: object) -> None:
    """What each row looked at: after the call's own arguments those of `foveate.softmax.native.looked`."""
