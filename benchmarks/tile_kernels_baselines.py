"""TileKernels' own kernels for ops of ours, as baselines: `tile-kernels` 1.0.0 on PyPI (mHC and casts).

Where its public function does work that a model would do once (rounding `fn` to TF32), the kernels behind it are
called directly. Its mHC stops before the norm, so it does a little less than the ops it stands beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Args = list[Tensor | None]
Baseline = Callable[[Args, Mapping[str, Any]], Callable[[], object]]


def _pre(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, attrs: Mapping[str, Any]) -> Callable[[], object]:
    from tile_kernels.mhc.norm_fn_kernel import _mhc_pre_norm_fn_fwd_mul, round_to_tf32
    from tile_kernels.mhc.pre_big_fuse_kernel import _mhc_pre_big_fuse

    tokens, streams, dim = x.shape
    rows = streams * (2 + streams)
    mix = torch.empty(1, tokens, rows, device=x.device)
    squares = torch.empty(1, tokens, device=x.device)
    post, comb = torch.empty(tokens, streams, device=x.device), torch.empty(tokens, streams**2, device=x.device)
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device)
    rounded = round_to_tf32(fn)
    project = _mhc_pre_norm_fn_fwd_mul(rows, 1, streams * dim)
    finish = _mhc_pre_big_fuse(
        dim, attrs["norm_eps"], attrs["eps"], attrs["eps"], 2.0, attrs["iters"], n_splits=1, mhc_mult=streams
    )

    def run() -> object:
        project(x.view(tokens, -1), rounded, mix.view(-1, 1, rows), squares.view(-1, 1))
        finish(mix, squares, scale, base, x, post, comb, out)
        return out

    return run


def hc_pre(args: Args, attrs: Mapping[str, Any]) -> Callable[[], object]:
    x, fn, base, scale = args[:4]
    assert x is not None and fn is not None and base is not None and scale is not None
    return _pre(x, fn, base, scale, attrs)


def hc_post(args: Args, attrs: Mapping[str, Any]) -> Callable[[], object]:
    from tile_kernels.mhc.post_kernel import mhc_post_fwd

    y, x, post, comb = args[:4]
    assert y is not None and x is not None and post is not None and comb is not None
    out = torch.empty_like(x).unsqueeze(0)
    given = (y.unsqueeze(0), x.unsqueeze(0), post.unsqueeze(0).unsqueeze(-1), comb.unsqueeze(0))
    return lambda: mhc_post_fwd(*given, out)


def hc_post_pre(args: Args, attrs: Mapping[str, Any]) -> Callable[[], object]:
    post = hc_post(args, attrs)
    x, fn, base, scale = args[1], *args[4:7]
    assert x is not None and fn is not None and base is not None and scale is not None
    pre = _pre(x, fn, base, scale, attrs)

    def run() -> object:
        post()
        return pre()

    return run


def quantise_rows(args: Args, attrs: Mapping[str, Any]) -> Callable[[], object]:
    from tile_kernels.quant import per_token_cast

    x = args[0]
    return lambda: per_token_cast(x, "e4m3", attrs["group"], round_sf=True)


def swiglu_quantise(args: Args, attrs: Mapping[str, Any]) -> Callable[[], object]:
    from tile_kernels.quant import swiglu_forward_and_per_token_cast

    x = args[0]
    return lambda: swiglu_forward_and_per_token_cast(
        x, "e4m3", attrs["group"], round_sf=True, swiglu_clamp_value=attrs["limit"]
    )


BASELINES: Mapping[str, Baseline] = {
    "hc_pre": hc_pre,
    "hc_pre_norm": hc_pre,
    "hc_pre_norm_quantise": hc_pre,
    "hc_post": hc_post,
    "hc_post_pre_norm": hc_post_pre,
    "hc_post_pre_norm_quantise": hc_post_pre,
    "quantise_rows": quantise_rows,
    "swiglu_quantise": swiglu_quantise,
}
