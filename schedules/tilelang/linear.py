"""Linear layers of bfloat16 with float32 results. A factory of TileLang kernels.

One warpgroup feeds tiles through a ring of `stages`; one for every 64 rows of a tile multiplies them.

Legend: M tokens (dynamic), N output channels, K input channels, BM, BN, BK sizes of a tile.
"""

import tilelang.language as T


@T.macro
def multiply(x_tile, w_tile, stage, total, first):
    """Starts total = x tile x w tile, added to what is there unless it is the first."""
    T.wgmma_gemm(
        x_tile[stage, :, :],
        w_tile[stage, :, :],
        total,
        transpose_B=True,
        clear_accum=first,
        policy=T.GemmWarpPolicy.FullRow,
    )


def mixed(N: int, K: int, BM: int, BN: int, stages: int, panel: int):
    """f32 [M, N] = bf16 [M, K] x bf16 [N, K]."""
    M = T.dynamic("M")
    BK = 64  # 128 bytes: the widest swizzled row
    steps = K // BK
    workers = BM * 2

    @T.prim_func
    def linear_mixed(x: T.Tensor((M, K), "bfloat16"), w: T.Tensor((N, K), "bfloat16"), y: T.Tensor((M, N), "float32")):
        with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=workers + 128) as (bn, bm):
            x_tile = T.alloc_shared((stages, BM, BK), "bfloat16")
            w_tile = T.alloc_shared((stages, BN, BK), "bfloat16")
            total = T.alloc_fragment((BM, BN), "float32")
            filled = T.alloc_barrier([128] * stages)
            freed = T.alloc_barrier([workers] * stages)
            if panel:
                T.use_swizzle(panel)
            tx = T.get_thread_binding()

            if tx >= workers:
                if BM > 64:
                    T.set_max_nreg(40, 0)
                for k in T.serial(steps):
                    stage = k % stages
                    T.barrier_wait(freed[stage], (k // stages + 1) % 2)
                    T.tma_copy(
                        x[bm * BM : bm * BM + BM, k * BK : k * BK + BK], x_tile[stage, :, :], barrier=filled[stage]
                    )
                    T.tma_copy(
                        w[bn * BN : bn * BN + BN, k * BK : k * BK + BK], w_tile[stage, :, :], barrier=filled[stage]
                    )
                    T.barrier_arrive(filled[stage])
            else:
                if BM > 64:
                    T.set_max_nreg(232, 1)
                T.barrier_wait(filled[0], 0)
                multiply(x_tile, w_tile, 0, total, True)
                for k in T.serial(1, steps):
                    T.barrier_wait(filled[k % stages], k // stages % 2)
                    multiply(x_tile, w_tile, k % stages, total, False)
                    T.wait_wgmma(1)
                    T.barrier_arrive(freed[(k - 1) % stages])
                T.wait_wgmma(0)
                T.copy(total, y[bm * BM : bm * BM + BM, bn * BN : bn * BN + BN])

    return linear_mixed
