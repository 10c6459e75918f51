"""Linear layers: FP8 with block scales, and bfloat16 with float32 results. Factories of TileLang kernels.

One warpgroup feeds tiles through a ring of `stages`; one for every 64 rows of a tile multiplies them.

Legend: M tokens (dynamic), N output channels, K input channels, G groups; BM, BN, BK sizes of a tile.
"""

import tilelang.language as T

GROUP = 128  # channels of a row that share an activation scale, and the sides of a block that share a weight scale


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


def fp8(N: int, K: int, G: int, BM: int, BN: int, stages: int, panel: int):
    """bf16 [M, N] = e4m3 [M, G * K] x e4m3 [N, K]; N / G outputs belong to each group of inputs.

    The matrix unit sums 128 channels; the sums are scaled and added while it works on the next 128. `panel` tiles of
    rows share their weights' way through L2 (0: in launch order).
    """
    M = T.dynamic("M")
    steps = K // GROUP
    workers = BM * 2

    @T.prim_func
    def linear_fp8(
        x: T.Tensor((M, G * K), "float8_e4m3fn"),
        x_scale: T.Tensor((M, G * steps), "float32"),
        w: T.Tensor((N, K), "float8_e4m3fn"),
        w_scale: T.Tensor((-(-N // GROUP), steps), "float32"),
        y: T.Tensor((M, N), "bfloat16"),
    ):
        with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=workers + 128) as (bn, bm):
            x_tile = T.alloc_shared((stages, BM, GROUP), "float8_e4m3fn")
            w_tile = T.alloc_shared((stages, BN, GROUP), "float8_e4m3fn")
            x_scales = T.alloc_shared((BM, steps), "float32")
            w_scales = T.alloc_shared((steps,), "float32")
            y_tile = T.alloc_shared((BM, BN), "bfloat16")
            even = T.alloc_fragment((BM, BN), "float32")
            odd = T.alloc_fragment((BM, BN), "float32")
            total = T.alloc_fragment((BM, BN), "float32")
            filled = T.alloc_barrier([128] * stages)
            freed = T.alloc_barrier([workers] * stages)
            scaled = T.alloc_barrier(128)
            if panel:
                T.use_swizzle(panel)
            tx = T.get_thread_binding()
            group = bn * BN // (N // G)

            if tx >= workers:
                if BM > 64:
                    T.set_max_nreg(40, 0)
                T.tma_copy(
                    x_scale[bm * BM : bm * BM + BM, group * steps : group * steps + steps], x_scales, barrier=scaled
                )
                T.tma_copy(w_scale[bn * BN // GROUP, 0:steps], w_scales, barrier=scaled)
                T.barrier_arrive(scaled)
                for k in T.serial(steps):
                    stage = k % stages
                    at = group * K + k * GROUP
                    T.barrier_wait(freed[stage], (k // stages + 1) % 2)
                    T.tma_copy(x[bm * BM : bm * BM + BM, at : at + GROUP], x_tile[stage, :, :], barrier=filled[stage])
                    T.tma_copy(
                        w[bn * BN : bn * BN + BN, k * GROUP : k * GROUP + GROUP],
                        w_tile[stage, :, :],
                        barrier=filled[stage],
                    )
                    T.barrier_arrive(filled[stage])
            else:
                if BM > 64:
                    T.set_max_nreg(232, 1)
                T.clear(total)
                T.barrier_wait(filled[0], 0)
                multiply(x_tile, w_tile, 0, even, True)
                T.barrier_wait(scaled, 0)
                for h in T.serial(steps // 2):
                    T.barrier_wait(filled[(2 * h + 1) % stages], (2 * h + 1) // stages % 2)
                    multiply(x_tile, w_tile, (2 * h + 1) % stages, odd, True)
                    T.wait_wgmma(1)
                    T.barrier_arrive(freed[2 * h % stages])
                    for i, j in T.Parallel(BM, BN):
                        total[i, j] += even[i, j] * (x_scales[i, 2 * h] * w_scales[2 * h])
                    if h + 1 < steps // 2:
                        T.barrier_wait(filled[(2 * h + 2) % stages], (2 * h + 2) // stages % 2)
                        multiply(x_tile, w_tile, (2 * h + 2) % stages, even, True)
                        T.wait_wgmma(1)
                    else:
                        T.wait_wgmma(0)
                    T.barrier_arrive(freed[(2 * h + 1) % stages])
                    for i, j in T.Parallel(BM, BN):
                        total[i, j] += odd[i, j] * (x_scales[i, 2 * h + 1] * w_scales[2 * h + 1])
                T.copy(total, y_tile)
                T.copy(y_tile, y[bm * BM, bn * BN])

    return linear_fp8


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
