"""The whole family as data, for `foveate mechanisms` and the docs.

A test makes every call and tries every claim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foveate.errors import InvalidInput

SOFTMAX = ("sdpa", "native", "flex", "chunked", "reference")
PATTERN = ("native", "flex", "chunked", "reference")
BY_ROWS = ("chunked", "reference")
LINEAR = ("native", "chunked", "recurrence")


@dataclass(frozen=True)
class Mechanism:
    """One way to attend.

    call: what one types, with q, k, v `[batch, heads, length, dim]`, causal where it can be; `layer` is the module with
        its projections and `page` its page below docs/mechanisms. What is a whole model is given what it reads.
    cost: time, for n queries and keys of size d.
    cross: whether queries of one text can look at another, of any length.
    gradients: "all", "v" alone, or "by reward": q and k through the log-probability of a choice.
    decode: one step after another, from a "cache" of keys and values or from a "state" of fixed size; None = not so.
    backends: those that can run it; none where there is but one way: some rows at a time, or attention calls
        for its parts.
    """

    name: str
    family: str
    equation: str
    cost: str
    call: str
    paper: str
    link: str
    causal: bool
    cross: bool
    gradients: Literal["all", "v", "by reward"] = "all"
    decode: Literal["cache", "state"] | None = None
    backends: tuple[str, ...] = ()
    layer: str | None = None
    page: str | None = None

    @property
    def url(self) -> str:
        """Where the paper is."""
        return self.link if "/" in self.link else f"https://arxiv.org/abs/{self.link}"

    @property
    def abilities(self) -> tuple[str, ...]:
        """What it can do, in words."""
        able = ("causal",) * self.causal + ("cross",) * self.cross
        able += ({"all": "gradients", "v": "gradient to v", "by reward": "gradients by reward"}[self.gradients],)
        return able + ((f"steps by {self.decode}",) if self.decode else ())


def _softmax(name: str, equation: str, call: str, paper: str, link: str, *, family: str, cost: str = "n² d",
             backends: tuple[str, ...] = SOFTMAX, gradients: Literal["all", "v"] = "all", layer: str | None = None,
             page: str | None = None, decode: Literal["cache"] | None = "cache") -> Mechanism:  # fmt: skip
    """What `fv.attention` can do whatever the pattern, the score or the normalizer: all of it."""
    return Mechanism(name, family, equation, cost, call, paper, link, True, True, gradients, decode, backends, layer,
                     page)  # fmt: skip


def _linear(name: str, equation: str, call: str, paper: str, link: str, page: str, layer: str | None = None,
            cost: str = "n d²") -> Mechanism:  # fmt: skip
    """What `fv.linear_attention` can do in all of its forms."""
    return Mechanism(name, "linear", equation, cost, call, paper, link, True, True, "all", "state", LINEAR, layer, page)


MECHANISMS: tuple[Mechanism, ...] = (
    _softmax(
        "softmax", "softmax(q kᵀ / √d) v", "fv.attention(q, k, v, fv.causal)", "Vaswani et al. 2017", "1706.03762",
        family="softmax", layer="MultiHeadAttention", page="../tour.md",
    ),
    _softmax(
        "grouped heads", "query head h reads key head h // group", "fv.attention(q, k[:, :2], v[:, :2], fv.causal)",
        "Ainslie et al. 2023", "2305.13245", family="softmax", layer="MultiHeadAttention", page="../meanings.md",
    ),
    _softmax(
        "sinks", "exp(s) / (exp(sink) + Σ exp(s))", "fv.attention(q, k, v, fv.causal, score=fv.sinks(sink))",
        "OpenAI 2025", "2508.10925", family="softmax", backends=("native", *BY_ROWS), page="../meanings.md",
    ),
    _softmax(
        "softmax plus one", "exp(s) / (1 + Σ exp(s))",
        "fv.attention(q, k, v, fv.causal, normalizer=fv.softmax_plus_one)", "Miller 2023",
        "https://www.evanmiller.org/attention-is-off-by-one.html",
        family="normalizer", backends=("native", *BY_ROWS), page="normalizers.md",
    ),
    _softmax(
        "sigmoid", "1 / (1 + exp(−s))", "fv.attention(q, k, v, fv.causal, normalizer=fv.sigmoid)",
        "Ramapuram et al. 2024", "2409.04431", family="normalizer", backends=BY_ROWS, page="normalizers.md",
    ),
    _softmax(
        "sparsemax", "[s − τ]₊, which sums to 1", "fv.attention(q, k, v, fv.causal, normalizer=fv.sparsemax)",
        "Martins & Astudillo 2016", "1602.02068", family="normalizer", backends=BY_ROWS, page="normalizers.md",
    ),
    _softmax(
        "entmax", "[(α − 1) s − τ]₊^(1/(α − 1))", "fv.attention(q, k, v, fv.causal, normalizer=fv.entmax(1.5))",
        "Peters et al. 2019", "1905.05702", family="normalizer", backends=BY_ROWS, page="normalizers.md",
    ),
    _softmax(
        "argmax", "v at argmax(s)", "fv.attention(q, k, v, fv.causal, normalizer=fv.hardmax)", "Xu et al. 2015",
        "1502.03044", family="hard", backends=BY_ROWS, gradients="v", page="hard.md",
    ),
    Mechanism(
        "straight-through", "hard", "forward argmax, backward softmax(s / T)", "n² d",
        "fv.straight_through(q, k, v, fv.causal)", "Bengio et al. 2013", "1308.3432",
        causal=True, cross=True, decode="cache", page="hard.md",
    ),
    Mechanism(
        "Gumbel", "hard", "forward argmax(s + g), backward softmax((s + g) / T)", "n² d",
        "fv.gumbel_attention(q, k, v, fv.causal, generator=draw)", "Jang et al. 2016", "1611.01144",
        causal=True, cross=True, page="hard.md",
    ),
    Mechanism(
        "sampled", "hard", "v at j ~ softmax(s), with log p(j) for REINFORCE", "n² d",
        "fv.sampled_attention(q, k, v, fv.causal, generator=draw)", "Xu et al. 2015", "1502.03044",
        causal=True, cross=True, gradients="by reward", page="hard.md",
    ),
    Mechanism(
        "glimpses", "hard", "l ~ N(tanh(W h), σ²), h ← relu(W h + U g(image, l))", "glimpses · size²",
        "fv.nn.RecurrentAttentionModel(1, 5, glimpses=4, size=3)(images, generator=draw)", "Mnih et al. 2014",
        "1406.6247", causal=False, cross=False, gradients="by reward", layer="RecurrentAttentionModel",
        page="glimpses.md",
    ),
    Mechanism(
        "additive", "recurrent decoders", "softmax(w · tanh(W q + U k)) v", "n² d",
        "fv.additive_attention(q, k, v, vector, fv.causal)", "Bahdanau et al. 2014", "1409.0473",
        causal=True, cross=True, decode="cache", layer="AdditiveAttention", page="additive.md",
    ),
    _softmax(
        "Luong", "softmax(h · h̄) v, or W h for h", "fv.attention(q, k, v, fv.causal, scale=1.0)", "Luong et al. 2015",
        "1508.04025", family="recurrent decoders", layer="LuongAttention", page="luong.md",
    ),
    Mechanism(
        "local-p", "recurrent decoders", "softmax(s) · exp(−(j − p)² / 2σ²), |j − p| ≤ D", "n D d",
        "fv.local_attention(q, k, v, center, fv.causal, width=4)", "Luong et al. 2015", "1508.04025",
        causal=True, cross=True, decode="cache", layer="LuongAttention", page="luong.md",
    ),
    Mechanism(
        "attentive decoder", "recurrent decoders", "s ← RNN([y; h̃], s), h̃ = tanh(W [attention(s); s])", "steps · n d",
        "fv.nn.AttentiveDecoder(11, 8, fv.nn.LuongAttention(8, 8))(targets, memory)", "Luong et al. 2015",
        "1508.04025", causal=True, cross=True, decode="state", layer="AttentiveDecoder", page="decoder.md",
    ),
    _linear(
        "elu + 1", "φ(q) Σ φ(k) vᵀ / φ(q) Σ φ(k)", "fv.elu_linear(q, k, v)", "Katharopoulos et al. 2020",
        "2006.16236", "elu-linear.md", "LinearAttention",
    ),
    _linear(
        "Performer", "the same, E[φ(q) · φ(k)] = exp(q·k / √d)", "fv.performer(q, k, v, favor)",
        "Choromanski et al. 2020", "2009.14794", "performer.md", "Performer", "n m d, m features",
    ),
    _linear(
        "cosFormer", "the same, φ(q) · φ(k) = relu(q) · relu(k) · cos(π (t − j) / 2M)",
        "fv.linear_attention(q, k, v, feature=fv.cosformer(1000, start=start), normalize=True)", "Qin et al. 2022",
        "2202.08791", "feature-maps.md", None, "2 n d²",
    ),
    _linear(
        "Based", "the same, φ(q) · φ(k) = 1 + s + s²/2",
        "fv.linear_attention(q, k, v, feature=fv.taylor, normalize=True)", "Arora et al. 2024", "2402.18668",
        "feature-maps.md", None, "n d³",
    ),
    _linear(
        "Hedgehog", "the same, φ learned", "fv.linear_attention(q, k, v, feature=fv.hedgehog(weight), normalize=True)",
        "Zhang et al. 2024", "2402.04347", "feature-maps.md", None, "2 n d²",
    ),
    _linear(
        "retention", "S = γ S + k vᵀ, out = Sᵀ q", "fv.retention(q, k, v)", "Sun et al. 2023", "2307.08621",
        "retention.md", "MultiScaleRetention",
    ),
    _linear(
        "Lightning", "the same, other constants", "fv.retention(q, k, v, rates)", "Qin et al. 2024", "2401.04658",
        "retention.md", "LightningAttention",
    ),
    _linear(
        "gated linear", "S = diag(α) S + k vᵀ", "fv.gated_linear(q, k, v, decays)", "Yang et al. 2023", "2312.06635",
        "gated-linear.md", "GatedLinearAttention",
    ),
    _linear(
        "delta rule", "S = (I − β k kᵀ) S + β k vᵀ", "fv.delta(q, unit, v, beta)", "Yang et al. 2024", "2406.06484",
        "delta.md", "DeltaNet",
    ),
    _linear(
        "gated delta", "S = (I − β k kᵀ) α S + β k vᵀ", "fv.gated_delta(q, unit, v, decay, beta)", "Yang et al. 2024",
        "2412.06464", "gated-delta.md", "GatedDeltaNet",
    ),
    _linear(
        "Kimi delta", "S = (I − β k kᵀ) diag(α) S + β k vᵀ", "fv.kimi_delta(q, unit, v, decays, beta)",
        "Kimi Team 2025", "2510.26692", "kimi-delta.md", "KimiDeltaAttention",
    ),
    _softmax(
        "sliding window", "the last w keys", "fv.attention(q, k, v, fv.causal & fv.window(8))", "Jiang et al. 2023",
        "2310.06825", family="by position", cost="n w d", backends=PATTERN, page="../patterns.md",
    ),
    _softmax(
        "Longformer", "a window, and global tokens", "fv.attention(q, k, v, fv.causal & fv.longformer(8))",
        "Beltagy et al. 2020", "2004.05150", family="by position", cost="n (w + g) d", backends=PATTERN,
        layer="LongformerAttention", page="longformer.md",
    ),
    _softmax(
        "BigBird", "a window, global and random blocks", "fv.attention(q, k, v, fv.causal & fv.bigbird(4))",
        "Zaheer et al. 2020", "2007.14062", family="by position", cost="n · blocks · d", backends=PATTERN, decode=None,
        layer="BigBirdAttention", page="bigbird.md",
    ),
    Mechanism(
        "dilated", "by position", "every s-th key, w of them", "n w d",
        "fv.dilated_attention(q, k, v, 3, fv.causal & fv.window(4))", "Beltagy et al. 2020", "2004.05150",
        causal=True, cross=False, page="strided.md",
    ),
    Mechanism(
        "strided", "by position", "the last s keys, and every s-th before", "n √n d",
        "fv.strided_attention(q, k, v, 4)", "Child et al. 2019", "1904.10509",
        causal=True, cross=False, layer="Strided", page="strided.md",
    ),
    Mechanism(
        "fixed", "by position", "the own block, and the last c keys of all before", "n √n d",
        "fv.fixed_attention(q, k, v, 4)", "Child et al. 2019", "1904.10509",
        causal=True, cross=False, layer="Fixed", page="strided.md",
    ),
    _softmax(
        "chunks", "the own chunk of c keys", "fv.attention(q, k, v, fv.causal & fv.chunks(8))", "Meta 2025",
        "https://ai.meta.com/blog/llama-4-multimodal-intelligence/", family="by position", cost="n c d",
        backends=PATTERN, layer="ChunkedAttention", page="chunks.md",
    ),
    _softmax(
        "streaming", "the first keys, and a window", "fv.attention(q, k, v, fv.causal & fv.streaming(2, 8))",
        "Xiao et al. 2023", "2309.17453", family="by position", cost="n w d", backends=PATTERN, page="../patterns.md",
    ),
    _softmax(
        "top-k", "the k highest scores", "fv.attention(q, k, v, fv.selection.topk(q, k, fv.causal, top_k=4))",
        "Gupta et al. 2021", "2106.06899", family="by selection", cost="n² d + n k d",
        backends=PATTERN, page="selection.md",
    ),
    _softmax(
        "DSA", "the k highest Σ w · relu(q_I · k_I)",
        "fv.attention(q, k, v, fv.selection.lightning(q_index, k_index, w_index, fv.causal, top_k=4))",
        "DeepSeek-AI 2025", "2512.02556", family="by selection", cost="n² d_I + n k d", backends=PATTERN,
        layer="LightningIndexer", page="dsa.md",
    ),
    _softmax(
        "MoBA", "blocks by q · mean(k)", "fv.attention(q, k, v, fv.selection.moba(q, k, block=4, top_k=2))",
        "Lu et al. 2025", "2502.13189", family="by selection", cost="n² d / B + n k B d", backends=PATTERN,
        layer="MoBA", page="moba.md",
    ),
    _softmax(
        "Quest", "blocks by the most that q · k can be",
        'fv.attention(q, k, v, fv.selection.block_topk(q, k, fv.causal, block=4, top_k=2, pool="bounds"))',
        "Tang et al. 2024", "2406.10774", family="by selection", cost="n² d / B + n k B d", backends=PATTERN,
        decode=None, page="selection.md",
    ),
    _softmax(
        "heavy hitters", "the k keys that received most, and a window",
        "fv.attention(q, k, v, fv.causal & (fv.selection.heavy_hitters(received, top_k=4) | fv.window(left=3)))",
        "Zhang et al. 2023", "2306.14048", family="by selection", cost="n (k + w) d", backends=PATTERN,
        page="heavy-hitters.md",
    ),
    Mechanism(
        "NSA", "by selection", "Σ gate · attention: compressed, selected, sliding", "n² / stride + n (k B + w) d",
        "fv.nn.NativeSparseAttention(8, 4, length=4, stride=2, block=4, top_k=3, window=4)(tokens)",
        "Yuan et al. 2025", "2502.11089", causal=True, cross=False, layer="NativeSparseAttention", page="nsa.md",
    ),
    Mechanism(
        "LSH", "hashed", "keys of the same hash", "n c d · rounds",
        "fv.lsh_attention(x, v, fv.causal, chunk=8, generator=draw)", "Kitaev et al. 2020", "2001.04451",
        causal=False, cross=False, layer="ReformerAttention", page="lsh.md",
    ),
    Mechanism(
        "MLA", "low rank", "k, v = W c, c = W' x: the cache holds c alone", "n² d",
        "fv.nn.LatentAttention(8, 2, latent_dim=5, query_latent_dim=None, head_dim=3, rope_dim=2, value_dim=3)"
        "(tokens, fv.causal)", "DeepSeek-AI 2024", "2405.04434",
        causal=True, cross=False, decode="cache", layer="LatentAttention", page="latent.md",
    ),
    Mechanism(
        "Linformer", "low rank", "softmax(q (E k)ᵀ / √d) F v", "n m d", "fv.linformer_attention(q, k, v, E, F)",
        "Wang et al. 2020", "2006.04768", causal=False, cross=True, layer="Linformer", page="linformer.md",
    ),
    Mechanism(
        "Nyström", "low rank", "softmax(q k̃ᵀ) softmax(q̃ k̃ᵀ)⁺ softmax(q̃ kᵀ) v", "n m d",
        "fv.nystrom_attention(q, k, v, landmarks=4)", "Xiong et al. 2021", "2102.03902",
        causal=False, cross=True, layer="Nystrom", page="nystrom.md",
    ),
)  # fmt: skip


def chosen(text: str | None) -> list[Mechanism]:
    """The rows with a text somewhere in them, whatever its case; None = all."""
    found = [one for one in MECHANISMS if text is None or text.lower() in repr(one).lower()]
    if not found:
        raise InvalidInput(f"no mechanism has {text!r} in its row: `foveate mechanisms` shows them all")
    return found
