"""The plain model's function over a batch of whole sequences, for training: same parameters, same results, faster.

`dsv4c.model.Transformer` gathers every token's keys and expert weights, which is right for a ragged step and slow for
training. Here sequences are [B, S] from position 0, so a block of `sliding_window` queries attends to its own and
the previous block, compressed entries are a reshape, and experts run as one grouped GEMM over sorted tokens.
tests/examples/test_train_nano.py holds both to the same logits. Weights are float32; the arithmetic follows the
dtype asked for.

The indexer learns by `index_loss` alone: the divergence between the softmax of its scores over all visible entries
and the attention those entries get in the main heads (detached), as in the reports on V3.2 and V4; its inputs are
detached too.

Legend: B sequences, S tokens, T = B * S, N streams, D hidden_size, H heads, C head_dim, E entries, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4c.config import ModelConfig
from dsv4c.model.rope import rope_frequencies, rope_table

Params = dict[str, Tensor]


# ---- small parts -----------------------------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (out if weight is None else out * weight).to(x.dtype)


def mm(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def rotate(x: Tensor, table_SR: Tensor, *, heads: bool, inverse: bool = False) -> Tensor:
    """RoPE of the last R channels of x [B, S, C] or (heads) [B, S, H, C]."""
    plain, pairs = x.split([x.shape[-1] - table_SR.shape[-1], table_SR.shape[-1]], -1)
    cos, sin = table_SR.chunk(2, -1)
    if heads:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if inverse:
        sin = -sin
    even, odd = pairs.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((plain, turned.to(x.dtype)), -1)


# ---- hyper-connections -----------------------------------------------------------------------------------------


def _sinkhorn_loop(a_T16: Tensor, iters: int, eps: float) -> Tensor:
    comb = torch.softmax(a_T16.unflatten(-1, (4, 4)), -1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb.flatten(-2)


@torch.library.custom_op("train_nano::sinkhorn", mutates_args=())
def sinkhorn(a_T16: Tensor, iters: int, eps: float) -> Tensor:
    """Doubly stochastic 4 x 4 matrices from logits; both float32 [T, 16], row-major."""
    if a_T16.is_cuda:
        from gpu_parts import sinkhorn_forward

        return sinkhorn_forward(a_T16, iters, eps)
    return _sinkhorn_loop(a_T16, iters, eps)


@torch.library.custom_op("train_nano::sinkhorn_grad", mutates_args=())
def sinkhorn_grad(m_T16: Tensor, grad_T16: Tensor, iters: int) -> Tensor:
    """Gradient of `sinkhorn`: every normalisation's backward, taken at the converged matrix."""
    if m_T16.is_cuda:
        from gpu_parts import sinkhorn_backward

        return sinkhorn_backward(m_T16, grad_T16, iters)
    m = m_T16.unflatten(-1, (4, 4))
    grad = grad_T16.unflatten(-1, (4, 4)) * m
    for _ in range(iters):
        grad = grad - m * grad.sum(-2, keepdim=True)
        grad = grad - m * grad.sum(-1, keepdim=True)
    return grad.flatten(-2)


@sinkhorn.register_fake
def _(a_T16: Tensor, iters: int, eps: float) -> Tensor:
    return torch.empty_like(a_T16)


@sinkhorn_grad.register_fake
def _(m_T16: Tensor, grad_T16: Tensor, iters: int) -> Tensor:
    return torch.empty_like(m_T16)


def _sinkhorn_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.iters = inputs[1]
    ctx.save_for_backward(output)


def _sinkhorn_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return sinkhorn_grad(ctx.saved_tensors[0], grad.contiguous(), ctx.iters), None, None


sinkhorn.register_autograd(_sinkhorn_backward, setup_context=_sinkhorn_setup)


def mix_coefficients(x_TND: Tensor, fn: Tensor, eps: float) -> Tensor:
    flat = x_TND.flatten(1)
    rho = torch.rsqrt(flat.float().square().mean(-1, keepdim=True) + eps)
    return F.linear(flat, fn.to(flat.dtype)).float() * rho


def hc_pre(x_TND: Tensor, p: Params, part: str, c: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    fn, base, scale = p[f"hc_{part}_fn"], p[f"hc_{part}_base"], p[f"hc_{part}_scale"]
    n = c.hc_mult
    mix = mix_coefficients(x_TND, fn, c.rms_norm_eps)
    pre = torch.sigmoid(mix[:, :n] * scale[0] + base[:n]) + c.hc_eps
    post = 2 * torch.sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = sinkhorn((mix[:, 2 * n :] * scale[2] + base[2 * n :]).contiguous(), c.hc_sinkhorn_iters, c.hc_eps)
    return (pre.unsqueeze(-1) * x_TND.float()).sum(1).to(x_TND.dtype), post, comb


def hc_post(y_TD: Tensor, x_TND: Tensor, post_TN: Tensor, comb_T16: Tensor) -> Tensor:
    n = x_TND.shape[1]
    comb = comb_T16.unflatten(-1, (n, n))
    x = x_TND.float()
    out = post_TN.unsqueeze(-1) * y_TD.float().unsqueeze(1)
    for j in range(n):
        out = out + comb[:, j].unsqueeze(-1) * x[:, j : j + 1]
    return out.to(x_TND.dtype)


def hc_head(x_TND: Tensor, p: Params, c: ModelConfig) -> Tensor:
    mix = mix_coefficients(x_TND, p["hc_head_fn"], c.rms_norm_eps)
    weight = torch.sigmoid(mix * p["hc_head_scale"] + p["hc_head_base"]) + c.hc_eps
    return (weight.unsqueeze(-1) * x_TND.float()).sum(1).to(x_TND.dtype)


# ---- attention -------------------------------------------------------------------------------------------------


def compress(x_BSD: Tensor, p: Params, ratio: int, overlap: bool, table_SR: Tensor, eps: float) -> Tensor:
    """Normalised, rotated entries [B, S // ratio, C]."""
    k = mm(x_BSD, p["wkv.weight"]).float().unflatten(1, (-1, ratio))
    z = mm(x_BSD, p["wgate.weight"]).float().unflatten(1, (-1, ratio)) + p["ape"]
    if overlap:
        half = k.shape[-1] // 2
        before = (0, 0, 0, 0, 1, 0)
        k = torch.cat((F.pad(k[:, :-1, :, :half], before), k[..., half:]), 2)
        z = torch.cat((F.pad(z[:, :-1, :, :half], before, value=float("-inf")), z[..., half:]), 2)
    entries = (torch.softmax(z, 2) * k).sum(2).to(x_BSD.dtype)
    return rotate(rms(entries, p["norm.weight"], eps), table_SR[::ratio], heads=False)


def sub(p: Params, prefix: str) -> Params:
    return {k[len(prefix) :]: v for k, v in p.items() if k.startswith(prefix)}


@torch.library.custom_op("train_nano::kth_largest", mutates_args=())
def kth_largest(scores: Tensor, k: int) -> Tensor:
    """[..., 1] the k-th largest of the last dim (a value just below it on a GPU); -inf stands for absent."""
    if scores.is_cuda:
        from gpu_parts import row_threshold

        return row_threshold(scores, k)
    return scores.topk(k, -1).values[..., -1:].contiguous()


@kth_largest.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], 1))


def attention(
    x_BSD: Tensor, p: Params, tables: tuple[Tensor, Tensor], c: ModelConfig, ratio: int, kind: str
) -> tuple[Tensor, Tensor]:
    """The sublayer's output [B, S, D] and the indexer's loss (0 where there is none)."""
    B, S, _ = x_BSD.shape
    H, C, W, eps = c.num_attention_heads, c.head_dim, c.sliding_window, c.rms_norm_eps
    table = tables[0] if kind == "window" else tables[1]
    latent = rms(mm(x_BSD, p["wq_a.weight"]), p["q_norm.weight"], eps)
    q = rotate(rms(mm(latent, p["wq_b.weight"]).unflatten(-1, (H, C)), None, eps), table, heads=True)
    kv = rotate(rms(mm(x_BSD, p["wkv.weight"]), p["kv_norm.weight"], eps), table, heads=False)

    # The window: blocks of W queries against their own and the previous block of keys. Queries and keys are
    # normalised, so the logits are small and the softmax needs no maximum.
    blocks = kv.unflatten(1, (S // W, W))
    keys = torch.cat((F.pad(blocks[:, :-1], (0, 0, 0, 0, 1, 0)), blocks), 2)
    q_rows = q.reshape(B, S // W, W * H, C)
    logits = (q_rows @ keys.transpose(-1, -2)).unflatten(2, (W, H)).float() * C**-0.5
    at = torch.arange(S, device=x_BSD.device).view(S // W, W, 1)
    key_at = (at[:, :1] - W) + torch.arange(2 * W, device=x_BSD.device)
    seen = (key_at >= 0) & (key_at <= at) & (key_at > at - W)
    weight = torch.where(seen.unsqueeze(2), torch.exp(logits.clamp(max=60.0)), 0.0)
    total = weight.sum(-1).view(B, S, H) + torch.exp(p["attn_sink"])
    out = (weight.to(kv.dtype).flatten(2, 3) @ keys).view(B, S, H, C).float()

    index_loss = x_BSD.new_zeros((), dtype=torch.float32)
    if kind != "window":
        csa = kind == "csa"
        entries = compress(x_BSD, sub(p, "compressor."), ratio, csa, tables[1], eps)
        logits = (q.reshape(B, S * H, C) @ entries.transpose(1, 2)).view(B, S, H, -1).float() * C**-0.5
        complete = torch.arange(1, S + 1, device=x_BSD.device) // ratio
        visible = torch.arange(S // ratio, device=x_BSD.device) < complete.unsqueeze(1)
        mass = torch.where(visible.unsqueeze(1), torch.exp(logits.clamp(max=60.0)), 0.0)
        if csa:
            scores = index_scores(x_BSD.detach(), latent.detach(), sub(p, "indexer."), tables[1], c, ratio)
            scores = scores.masked_fill(~visible, float("-inf"))
            chosen = visible
            if S // ratio > c.index_topk:
                chosen = visible & (scores.detach() >= kth_largest(scores.detach(), c.index_topk))
            picked = torch.where(chosen.unsqueeze(-2), mass, 0.0)
            total = total + picked.sum(-1)
            index_loss = divergence((mass / total.unsqueeze(-1)).sum(2).detach(), scores, visible)
        else:
            picked = mass
            total = total + picked.sum(-1)
        out = out + (picked.to(kv.dtype).flatten(1, 2) @ entries).view(B, S, H, C).float()
    out = rotate((out / total.unsqueeze(-1)).to(x_BSD.dtype), table, heads=True, inverse=True)
    G = c.o_groups
    grouped = out.reshape(B * S, G, H * C // G).transpose(0, 1)
    z = torch.bmm(grouped, p["wo_a.weight"].to(out.dtype).unflatten(0, (G, -1)).transpose(1, 2))
    return mm(z.transpose(0, 1).reshape(B, S, -1), p["wo_b.weight"]), index_loss


def index_scores(x: Tensor, latent: Tensor, p: Params, table: Tensor, c: ModelConfig, ratio: int) -> Tensor:
    """The indexer's float32 scores [B, S, E], unmasked."""
    B, S, _ = x.shape
    heads, dim = c.index_n_heads, c.index_head_dim
    keys = compress(x, sub(p, "compressor."), ratio, True, table, c.rms_norm_eps)
    q = rotate(mm(latent, p["wq_b.weight"]).unflatten(-1, (heads, dim)), table, heads=True)
    dots = (q.reshape(B, S * heads, dim) @ keys.transpose(1, 2)).view(B, S, heads, -1)
    weight = mm(x, p["weights_proj.weight"]).float() * (heads * dim) ** -0.5
    return (dots.relu().float() * weight.unsqueeze(-1)).sum(2)


def divergence(mass: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
    """Mean KL(mass / sum(mass) || softmax(scores)) over the tokens that see an entry."""
    some = visible.any(-1)
    target = mass / (mass.sum(-1, keepdim=True) + 1e-9)
    guess = torch.log_softmax(torch.where(some.unsqueeze(-1), scores, 0.0), -1)
    terms = torch.where(visible, target * (torch.log(target + 1e-9) - guess.clamp(min=-1e4)), 0.0)
    return terms.sum() / (scores.shape[0] * some.sum())


# ---- experts ---------------------------------------------------------------------------------------------------


class Spread(torch.autograd.Function):
    """x [T, D] -> rows in expert order [T * K, D]; the gradient comes back by the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class Gather(torch.autograd.Function):
    """Rows in expert order [T * K, D] -> their sums for each token [T, D]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return y[inverse].unflatten(0, (-1, k)).float().sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order // ctx.k].to(torch.bfloat16 if grad.is_cuda else grad.dtype), None, None, None


def grouped(x: Tensor, weight_EIO: Tensor, ends: Tensor) -> Tensor:
    """Rows x of expert e (rows ends[e-1] .. ends[e]) times weight[e] [I, O]."""
    if x.is_cuda:
        return torch._grouped_mm(x, weight_EIO, offs=ends)
    bounds = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ w for a, b, w in zip(bounds, bounds[1:], weight_EIO, strict=False)])


def moe(x_TD: Tensor, token_ids: Tensor, p: Params, c: ModelConfig, hashed: bool) -> tuple[Tensor, Tensor]:
    """The sublayer's output [T, D] and how many tokens each expert got [E]."""
    K, limit = c.num_experts_per_tok, c.swiglu_limit
    scores = F.softplus(F.linear(x_TD.float(), p["gate.weight"].float())).sqrt()
    chosen = p["gate.tid2eid"][token_ids] if hashed else (scores + p["gate.bias"]).detach().topk(K, -1).indices
    weight = scores.gather(1, chosen)
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
    expert = chosen.flatten()
    order = expert.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    load = F.one_hot(expert, c.n_routed_experts).sum(0)
    ends = load.cumsum(0).to(torch.int32)
    rows = Spread.apply(x_TD, order, inverse, K)
    w13 = torch.cat((p["experts.w1"], p["experts.w3"]), 1).to(x_TD.dtype).transpose(1, 2)
    gate, up = grouped(rows, w13, ends).chunk(2, -1)
    hidden = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)
    hidden = (hidden * weight.flatten()[order].unsqueeze(-1)).to(x_TD.dtype)
    routed = Gather.apply(grouped(hidden, p["experts.w2"].to(x_TD.dtype).transpose(1, 2), ends), order, inverse, K)
    gate, up = mm(x_TD, p["shared_experts.w1.weight"]), mm(x_TD, p["shared_experts.w3.weight"])
    hidden = (F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)).to(x_TD.dtype)
    return (routed + mm(hidden, p["shared_experts.w2.weight"]).float()).to(x_TD.dtype), load


# ---- the model -------------------------------------------------------------------------------------------------


def block(
    x_TND: Tensor, token_ids: Tensor, p: Params, tables: tuple[Tensor, Tensor], c: ModelConfig, ratio: int, kind: str,
    hashed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The streams after one layer, its indexer's loss and its experts' load. token_ids is [B, S]."""
    B, S = token_ids.shape
    x, post, comb = hc_pre(x_TND, p, "attn", c)
    x = rms(x, p["attn_norm.weight"], c.rms_norm_eps).unflatten(0, (B, S))
    y, index_loss = attention(x, sub(p, "attn."), tables, c, ratio, kind)
    x_TND = hc_post(y.flatten(0, 1), x_TND, post, comb)
    x, post, comb = hc_pre(x_TND, p, "ffn", c)
    y, load = moe(rms(x, p["ffn_norm.weight"], c.rms_norm_eps), token_ids.flatten(), sub(p, "ffn."), c, hashed)
    return hc_post(y, x_TND, post, comb), index_loss, load


def collapse(x_TND: Tensor, p: Params, c: ModelConfig) -> Tensor:
    return rms(hc_head(x_TND, p, c), p["norm.weight"], c.rms_norm_eps)


def merge(x_TND: Tensor, embedding_TD: Tensor, p: Params, c: ModelConfig) -> Tensor:
    """The MTP block's input streams."""
    e = mm(rms(embedding_TD, p["enorm.weight"], c.rms_norm_eps), p["e_proj.weight"])
    return e.unsqueeze(1) + mm(rms(x_TND, p["hnorm.weight"], c.rms_norm_eps), p["h_proj.weight"])


@dataclass
class Result:
    """Head inputs [T, D] of the main model and the MTP block, the indexers' losses and each layer's expert load."""

    main_TD: Tensor
    mtp_TD: Tensor
    index_loss: Tensor
    loads: list[Tensor]


class Whole:
    """Runs whole sequences through parameters named as in the plain model."""

    def __init__(self, config: ModelConfig, length: int, device: torch.device | str, wrap: Callable[..., Any]) -> None:
        self.config = config
        positions = torch.arange(length)
        dim = config.qk_rope_head_dim
        plain = rope_frequencies(dim, config.rope_theta, None)
        scaled = rope_frequencies(dim, config.compress_rope_theta, config.rope_scaling)
        self.tables = (rope_table(positions, plain).to(device), rope_table(positions, scaled).to(device))
        self.block, self.collapse, self.merge = wrap(block), wrap(collapse), wrap(merge)

    def __call__(self, p: Params, ids_BS: Tensor, next_BS: Tensor, dtype: torch.dtype) -> Result:
        """`next_BS` are the ids one position later, which the MTP block is given."""
        c = self.config
        tables = (self.tables[0][: ids_BS.shape[1]], self.tables[1][: ids_BS.shape[1]])
        embed = p["embed.weight"].to(dtype)
        x = F.embedding(ids_BS.flatten(), embed).unsqueeze(1).expand(-1, c.hc_mult, -1).contiguous()
        losses, loads = [], []
        for layer in range(c.num_hidden_layers):
            own = body(p, f"layers.{layer}.")
            kind, hashed = c.attention_kind(layer), c.gate_kind(layer) == "hash"
            x, index_loss, load = self.block(x, ids_BS, own, tables, c, c.compress_ratios[layer], kind, hashed)
            losses.append(index_loss)
            loads.append(load)
        main_TD = self.collapse(x, ending(p, ""), c)
        x = self.merge(x, F.embedding(next_BS.flatten(), embed), joining(p), c)
        x, _, load = self.block(x, ids_BS, body(p, "mtp.0."), tables, c, 0, "window", False)
        mtp_TD = self.collapse(x, ending(p, "mtp.0."), c)
        return Result(main_TD, mtp_TD, torch.stack(losses).sum(), [*loads, load])


def body(p: Params, prefix: str) -> Params:
    """The parameters of one layer, without those that the MTP block has besides."""
    return {k: v for k, v in sub(p, prefix).items() if k.startswith(("hc_attn", "hc_ffn", "attn", "ffn"))}


def ending(p: Params, prefix: str) -> Params:
    """What `collapse` takes."""
    return {k: p[prefix + k] for k in ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm.weight")}


def joining(p: Params) -> Params:
    """What `merge` takes."""
    return {k: p["mtp.0." + k] for k in ("enorm.weight", "hnorm.weight", "e_proj.weight", "h_proj.weight")}
