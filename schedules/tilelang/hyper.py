"""Hyper-connections. Factories of TileLang kernels: `project` mixes and projects tiles, `finish` makes the next input.

The same split as in schedules/triton/hyper.py: partial products of fn over parts of the channels, then sums, Sinkhorn,
weighted sum and norm of one token a block. fn, float32, is split into bfloat16 high and low rows of one product.

Legend: M tokens (dynamic), 4 streams, D channels, DS channels of a block, S = D / DS, PART floats a token and split.
"""

import tilelang.language as T

PART = 32  # 24 products, then the sum of squares
ROWS = 24
BM = 64  # tokens of a tile: one warpgroup's rows
BD = 64  # channels at a time


def project(D: int, DS: int):
    """Streams of hc_post, and their partial products and squares."""
    M = T.dynamic("M")
    S = D // DS

    @T.prim_func
    def hc_project(
        y: T.Tensor((M, D), "bfloat16"),
        x: T.Tensor((M, 4, D), "bfloat16"),
        post: T.Tensor((M, 4), "float32"),
        comb: T.Tensor((M, 16), "float32"),
        fn: T.Tensor((ROWS, 4 * D), "float32"),
        streams: T.Tensor((M, 4, D), "bfloat16"),
        part: T.Tensor((S, M, PART), "float32"),
    ):
        with T.Kernel(T.ceildiv(M, BM), S, threads=128) as (bm, bs):
            x_tile = T.alloc_shared((4, BM, BD), "bfloat16")
            y_tile = T.alloc_shared((BM, BD), "bfloat16")
            z_tile = T.alloc_shared((BM, BD), "bfloat16")
            w_tile = T.alloc_shared((2 * ROWS, BD), "bfloat16")
            gains = T.alloc_shared((BM, 20), "float32")
            z = T.alloc_fragment((BM, BD), "float32")
            w = T.alloc_fragment((ROWS, BD), "float32")
            total = T.alloc_fragment((BM, 2 * ROWS), "float32")
            square = T.alloc_fragment((BM,), "float32")
            sums = T.alloc_shared((BM, 2 * ROWS), "float32")
            squares = T.alloc_shared((BM,), "float32")
            for i, k in T.Parallel(BM, 16):
                gains[i, k] = T.if_then_else(bm * BM + i < M, comb[bm * BM + i, k], 0)
            for i, k in T.Parallel(BM, 4):
                gains[i, 16 + k] = T.if_then_else(bm * BM + i < M, post[bm * BM + i, k], 0)
            T.clear(total)
            T.clear(square)
            for c in T.serial(DS // BD):
                d = bs * DS + c * BD
                for j in T.unroll(4):
                    T.copy(x[bm * BM : bm * BM + BM, j, d : d + BD], x_tile[j, :, :])
                T.copy(y[bm * BM : bm * BM + BM, d : d + BD], y_tile)
                for k in T.unroll(4):
                    for i, e in T.Parallel(BM, BD):
                        z[i, e] = (
                            gains[i, 16 + k] * T.cast(y_tile[i, e], "float32")
                            + gains[i, k] * T.cast(x_tile[0, i, e], "float32")
                            + gains[i, 4 + k] * T.cast(x_tile[1, i, e], "float32")
                            + gains[i, 8 + k] * T.cast(x_tile[2, i, e], "float32")
                            + gains[i, 12 + k] * T.cast(x_tile[3, i, e], "float32")
                        )
                    T.copy(z, z_tile)
                    T.copy(fn[0:ROWS, k * D + d : k * D + d + BD], w)
                    for r, e in T.Parallel(ROWS, BD):
                        w_tile[r, e] = T.cast(w[r, e], "bfloat16")
                        w_tile[ROWS + r, e] = T.cast(
                            w[r, e] - T.cast(T.cast(w[r, e], "bfloat16"), "float32"), "bfloat16"
                        )
                    T.copy(z_tile, streams[bm * BM : bm * BM + BM, k, d : d + BD])
                    T.gemm(z_tile, w_tile, total, transpose_B=True)
                    for i, e in T.Parallel(BM, BD):
                        rounded = T.cast(T.cast(z[i, e], "bfloat16"), "float32")
                        z[i, e] = rounded * rounded
                    T.reduce_sum(z, square, dim=1, clear=False)
            T.copy(total, sums)
            T.copy(square, squares)
            for i, r in T.Parallel(BM, PART):
                if bm * BM + i < M:
                    part[bs, bm * BM + i, r] = T.if_then_else(
                        r < ROWS, sums[i, T.min(r, ROWS - 1)] + sums[i, T.min(r, ROWS - 1) + ROWS], squares[i]
                    )

    return hc_project


def finish(D: int, S: int, iters: int, norm_eps: float, eps: float, out_eps: float):
    """Coefficients of a token, and its next input, normed."""
    M = T.dynamic("M")
    threads = 128

    @T.prim_func
    def hc_finish(
        streams: T.Tensor((M, 4, D), "bfloat16"),
        part: T.Tensor((S, M, PART), "float32"),
        base: T.Tensor((ROWS,), "float32"),
        scale: T.Tensor((3,), "float32"),
        weight: T.Tensor((D,), "float32"),
        out: T.Tensor((M, D), "bfloat16"),
        post: T.Tensor((M, 4), "float32"),
        comb: T.Tensor((M, 16), "float32"),
    ):
        with T.Kernel(M, threads=threads) as t:
            mix = T.alloc_shared((PART,), "float32")
            pre = T.alloc_shared((4,), "float32")
            v = T.alloc_local((1,), "float32")
            m = T.alloc_local((16,), "float32")
            total = T.alloc_local((1,), "float32")
            row = T.alloc_fragment((D,), "float32")
            square = T.alloc_fragment((D,), "float32")
            norm = T.alloc_fragment((1,), "float32")
            tx = T.get_thread_binding()
            if tx < PART:
                v[0] = 0
                for s in T.serial(S):
                    v[0] += part[s, t, tx]
                mix[tx] = v[0]
            T.sync_threads()
            if tx < ROWS:
                group = T.if_then_else(tx < 4, 0, T.if_then_else(tx < 8, 1, 2))
                v[0] = mix[tx] * T.rsqrt(mix[ROWS] / (4 * D) + norm_eps) * scale[group] + base[tx]
            T.sync_threads()
            if tx < ROWS:
                mix[tx] = v[0]
            T.sync_threads()
            if tx < 4:
                pre[tx] = 1 / (1 + T.exp(-mix[tx])) + eps
                post[t, tx] = 2 / (1 + T.exp(-mix[4 + tx]))
            T.sync_threads()
            for i in T.Parallel(D):
                row[i] = (
                    pre[0] * T.cast(streams[t, 0, i], "float32")
                    + pre[1] * T.cast(streams[t, 1, i], "float32")
                    + pre[2] * T.cast(streams[t, 2, i], "float32")
                    + pre[3] * T.cast(streams[t, 3, i], "float32")
                )
                row[i] = T.cast(T.cast(row[i], "bfloat16"), "float32")
                square[i] = row[i] * row[i]
            T.reduce_sum(square, norm, dim=0)
            for i in T.Parallel(D):
                out[t, i] = T.cast(row[i] * T.rsqrt(norm[0] / D + out_eps) * weight[i], "bfloat16")
            if tx >= threads - 32:  # one warp, every lane the same
                for j in T.unroll(4):
                    v[0] = T.max(T.max(mix[8 + 4 * j], mix[9 + 4 * j]), T.max(mix[10 + 4 * j], mix[11 + 4 * j]))
                    total[0] = 0
                    for k in T.unroll(4):
                        m[4 * j + k] = T.exp(mix[8 + 4 * j + k] - v[0])
                        total[0] += m[4 * j + k]
                    for k in T.unroll(4):
                        m[4 * j + k] = m[4 * j + k] / total[0] + eps
                for k in T.unroll(4):
                    total[0] = 1 / (m[k] + m[4 + k] + m[8 + k] + m[12 + k] + eps)
                    for j in T.unroll(4):
                        m[4 * j + k] *= total[0]
                for _ in T.serial(iters - 1):
                    for j in T.unroll(4):
                        total[0] = 1 / (m[4 * j] + m[4 * j + 1] + m[4 * j + 2] + m[4 * j + 3] + eps)
                        for k in T.unroll(4):
                            m[4 * j + k] *= total[0]
                    for k in T.unroll(4):
                        total[0] = 1 / (m[k] + m[4 + k] + m[8 + k] + m[12 + k] + eps)
                        for j in T.unroll(4):
                            m[4 * j + k] *= total[0]
                if tx == threads - 32:
                    for k in T.unroll(16):
                        comb[t, k] = m[k]

    return hc_finish
