"""Linear layers for few tokens: the weight is read once at the card's bandwidth. A factory of TileLang kernels.

A cluster of `splits` blocks shares the input channels of a tile of 64 tokens and BN output channels; each adds up its
share, sends every other block that block's columns, and writes its own. With `early`, the first weight tiles are
under way before the kernel that makes x has ended (programmatic dependent launch).

Legend: M tokens (dynamic), N output channels, K input channels, G groups.
"""

import tilelang.language as T

ROWS = 64  # tokens of a tile: what a wgmma takes
GROUP = 128  # channels of a row that share an activation scale, and the sides of a block that share a weight scale
PAD = 8  # floats between rows of a sum, so that 8 rows lie in different banks


def few(kind: str, N: int, K: int, G: int, BN: int, stages: int, splits: int, early: bool):
    """`fp8`: bf16 [M, N] of e4m3 [M, G * K] and e4m3 [N, K]; `mixed`: f32 [M, N] of bf16 [M, K] and bf16 [N, K]."""
    M = T.dynamic("M")
    fp8 = kind == "fp8"
    BK = 128 if fp8 else 64  # 128 bytes
    share = K // BK // splits
    wide = BN // splits
    threads = 256
    dtype, result = ("float8_e4m3fn", "bfloat16") if fp8 else ("bfloat16", "float32")
    groups = K // GROUP
    first_loads = min(stages, share)

    @T.macro
    def load_w(w, w_tile, filled, bn, k, stage):
        T.tma_copy(w[bn * BN : bn * BN + BN, k * BK : k * BK + BK], w_tile[stage, :, :], barrier=filled[stage])

    @T.macro
    def load_x(x, x_tile, filled, bm, column, stage):
        T.tma_copy(x[bm * ROWS : bm * ROWS + ROWS, column : column + BK], x_tile[stage, :, :], barrier=filled[stage])
        T.barrier_arrive(filled[stage])

    @T.macro
    def feed(x, w, x_tile, w_tile, filled, freed, bm, bn, rank):
        column = bn * BN // (N // G) * K
        for k in T.unroll(first_loads):
            load_w(w, w_tile, filled, bn, rank * share + k, k)
        if early:
            T.pdl_sync()
        for k in T.unroll(first_loads):
            load_x(x, x_tile, filled, bm, column + (rank * share + k) * BK, k)
        for k in T.serial(first_loads, share):
            T.barrier_wait(freed[k % stages], (k // stages + 1) % 2)
            load_w(w, w_tile, filled, bn, rank * share + k, k % stages)
            load_x(x, x_tile, filled, bm, column + (rank * share + k) * BK, k % stages)

    @T.macro
    def scale(x_scale, w_scale, scales, scaled, bm, bn, rank, row):
        if early:
            T.pdl_sync()
        group = bn * BN // (N // G)
        for k in T.unroll(share):
            scales[k, row] = (
                x_scale[bm * ROWS + row, group * groups + rank * share + k]
                * w_scale[bn * BN // GROUP, rank * share + k]
            )
        T.barrier_arrive(scaled)

    @T.macro
    def body(x, x_scale, w, w_scale, y):
        with T.Kernel(T.ceildiv(N, BN) * splits, T.ceildiv(M, ROWS), threads=threads, cluster_dims=splits) as (bx, bm):
            x_tile = T.alloc_shared((stages, ROWS, BK), dtype)
            w_tile = T.alloc_shared((stages, BN, BK), dtype)
            scales = T.alloc_shared((share, ROWS), "float32")
            parts = T.alloc_shared((splits, ROWS, wide + PAD), "float32")
            sums = T.alloc_shared((splits, ROWS, wide + PAD), "float32")
            part = T.alloc_fragment((ROWS, BN), "float32")
            total = T.alloc_fragment((ROWS, BN), "float32")
            added = T.alloc_fragment((ROWS, wide), "float32")
            filled = T.alloc_barrier([32] * stages)
            freed = T.alloc_barrier([128] * stages)
            scaled = T.alloc_barrier(64)
            landed = T.alloc_barrier(splits)
            tx = T.get_thread_binding()
            bn = bx // splits
            rank = bx % splits
            if early:
                T.pdl_trigger()
            if splits > 1:
                T.cluster_sync()  # nobody sends to a block whose barriers are not ready

            if tx >= 128:
                if tx < 160:
                    feed(x, w, x_tile, w_tile, filled, freed, bm, bn, rank)
                elif fp8 and tx >= 192:
                    scale(x_scale, w_scale, scales, scaled, bm, bn, rank, tx - 192)
            else:
                T.clear(total)
                if fp8:
                    T.barrier_wait(scaled, 0)
                for k in T.serial(share):
                    T.barrier_wait(filled[k % stages], k // stages % 2)
                    if fp8:
                        T.wgmma_gemm(
                            x_tile[k % stages, :, :], w_tile[k % stages, :, :], part, transpose_B=True, clear_accum=True
                        )
                    else:
                        T.wgmma_gemm(x_tile[k % stages, :, :], w_tile[k % stages, :, :], total, transpose_B=True)
                    T.wait_wgmma(0)
                    T.barrier_arrive(freed[k % stages])
                    if fp8:
                        for i, j in T.Parallel(ROWS, BN):
                            total[i, j] += part[i, j] * scales[k, i]
                if splits == 1:
                    T.copy(total, y[bm * ROWS : bm * ROWS + ROWS, bn * BN : bn * BN + BN])
                else:
                    for i, j in T.Parallel(ROWS, BN):
                        parts[j // wide, i, j % wide] = total[i, j]
                    T.fence_proxy_async()
                    T.sync_threads(1, 128)
                    for c in T.unroll(splits):
                        T.copy_cluster(parts[c, :, :], sums[rank, :, :], dst_block=c, remote_barrier=landed[0])
                    T.barrier_wait(landed[0], 0)
                    T.clear(added)
                    for c in T.unroll(splits):
                        for i, j in T.Parallel(ROWS, wide):
                            added[i, j] += sums[c, i, j]
                    column = bn * BN + rank * wide
                    T.copy(added, y[bm * ROWS : bm * ROWS + ROWS, column : column + wide])
            if splits > 1:
                T.cluster_sync()  # what a block sends must be read before it is gone

    if fp8:

        @T.prim_func
        def linear_fp8_few(
            x: T.Tensor((M, G * K), dtype),
            x_scale: T.Tensor((M, G * groups), "float32"),
            w: T.Tensor((N, K), dtype),
            w_scale: T.Tensor((-(-N // GROUP), groups), "float32"),
            y: T.Tensor((M, N), result),
        ):
            body(x, x_scale, w, w_scale, y)

        return linear_fp8_few

    @T.prim_func
    def linear_mixed_few(x: T.Tensor((M, K), dtype), w: T.Tensor((N, K), dtype), y: T.Tensor((M, N), result)):
        body(x, None, w, None, y)

    return linear_mixed_few
