"""Linear attention by the names of its papers: each is `linear_attention` with its own arguments, and nothing more.

All take and give a state; `fv.linear_attention` says what shapes and arguments mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.errors import InvalidInput
from foveate.linear.features import Favor, elu_plus_one
from foveate.linear.functional import linear_attention
from foveate.linear.problem import LinearState
from foveate.values import describe
from foveate.words import lenient

Found = tuple[Tensor, LinearState]


@lenient
def elu_linear(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Found:
    """Σ φ(q)·φ(k_j)·v_j / Σ φ(q)·φ(k_j) with φ = elu + 1: weights that need no softmax.

    Katharopoulos et al. 2020, "Transformers are RNNs": https://arxiv.org/abs/2006.16236

    >>> import torch
    >>> import foveate as fv
    >>> q = k = torch.zeros(1, 1, 3, 2)
    >>> fv.elu_linear(q, k, torch.tensor([0.0, 2.0, 4.0])[None, None, :, None])[0].flatten()
    tensor([0., 1., 2.])
    """
    return linear_attention(q, k, v, feature=elu_plus_one, normalize=True, **options)


@lenient
def performer(q: Tensor, k: Tensor, v: Tensor, feature: Favor, **options: Any) -> Found:
    """softmax(q·kᵀ/√dim)·v on average over the random directions of `feature = fv.favor(dim, features)`.

    Choromanski et al. 2020, "Rethinking Attention with Performers": https://arxiv.org/abs/2009.14794

    >>> import torch
    >>> import foveate as fv
    >>> q = k = v = torch.eye(4)[None, None]
    >>> phi = fv.favor(4, 4096, generator=torch.Generator().manual_seed(0))
    >>> (fv.performer(q, k, v, phi, causal=False)[0] - fv.attention(q, k, v)).abs().max() < 0.02
    tensor(True)
    """
    if not isinstance(feature, Favor):
        raise InvalidInput(f"feature is a {type(feature).__name__}: wanted what favor(dim, features) draws")
    return linear_attention(q, k, v, feature=feature, normalize=True, **options)


@lenient
def retention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, **options: Any) -> Found:
    """Σ_{j ≤ t} γ_h^{t−j}·(q_t·k_j)·v_j/√dim: one constant decay a head; None = log(1 − 2^{−5−h}), the paper's.

    Sun et al. 2023, "Retentive Network", equation 6: https://arxiv.org/abs/2307.08621. With other constants, Lightning
    attention: https://arxiv.org/abs/2401.04658

    >>> import torch
    >>> import foveate as fv
    >>> q = k = v = torch.ones(1, 1, 3, 1)
    >>> fv.retention(q, k, v)[0].flatten()
    tensor([1.0000, 1.9688, 2.9072])
    """
    if decay is None:
        decay = torch.log1p(-(2.0 ** -(5.0 + torch.arange(k.shape[-3], device=k.device, dtype=torch.float64))))
    elif not isinstance(decay, Tensor) or decay.dim() != 1:
        raise InvalidInput(f"retention's decay is {describe(decay)}: wanted one logarithm a head, [key heads]")
    return linear_attention(q, k, v, decay=decay, **options)


@lenient
def gated_linear(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, **options: Any) -> Found:
    """S_t = diag(exp(decay_t))·S_{t−1} + k_t·v_tᵀ with decays by step and channel, `[*batch, key heads, steps, dim]`.

    Yang et al. 2023, "Gated Linear Attention": https://arxiv.org/abs/2312.06635
    """
    return linear_attention(q, k, v, decay=decay, **options)


@lenient
def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options: Any) -> Found:
    """S_t = (I − β_t·k_t·k_tᵀ)·S_{t−1} + β_t·k_t·v_tᵀ: a key replaces what is stored under it; keys of length 1.

    Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight Programmers": https://arxiv.org/abs/2102.11174;
    in parallel: Yang et al. 2024, https://arxiv.org/abs/2406.06484

    >>> import torch
    >>> import foveate as fv
    >>> k = torch.ones(1, 1, 2, 1)  # the same key twice: the second value replaces the first
    >>> fv.delta(k, k, torch.tensor([3.0, 5.0])[None, None, :, None], torch.ones(1, 1, 2))[0].flatten()
    tensor([3., 5.])
    """
    return linear_attention(q, k, v, beta=beta, delta_rule=True, **options)


@lenient
def gated_delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, **options: Any) -> Found:
    """S_t = (I − β_t·k_t·k_tᵀ)·exp(decay_t)·S_{t−1} + β_t·k_t·v_tᵀ with one decay a step, `[*batch, key heads, steps]`.

    Yang et al. 2024, "Gated Delta Networks": https://arxiv.org/abs/2412.06464; as in Qwen3-Next.
    """
    return linear_attention(q, k, v, decay=decay, beta=beta, delta_rule=True, **options)


@lenient
def kimi_delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, **options: Any) -> Found:
    """`gated_delta` with a decay for every channel, `[*batch, key heads, steps, dim]`.

    Kimi Team 2025, "Kimi Linear": https://arxiv.org/abs/2510.26692
    """
    if not isinstance(decay, Tensor) or decay.dim() != k.dim():
        raise InvalidInput(
            f"kimi_delta's decay is {describe(decay)}: wanted one by step and channel, {k.dim()} dimensions as k has"
        )
    return linear_attention(q, k, v, decay=decay, beta=beta, delta_rule=True, **options)
