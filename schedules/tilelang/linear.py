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


def fp8(N: int, K: int, G: int, BM: int, BN: int, stages: int, panel: int, cluster: int, blocks: int):
    """bf16 [M, N] = e4m3 [M, G * K] x e4m3 [N, K]; N / G outputs belong to each group of inputs.

    The matrix unit sums 128 channels; a warpgroup scales and adds such sums while the unit works on the next ones.
    One warp feeds tiles, two multiply the scales of x and w and turn them so that 8 rows lie in 8 banks.
    Up to `blocks` blocks take tiles in turn, bands of `panel` row tiles after another; the blocks of a `cluster` have
    tiles below each other and load the weight once for all of them.
    """
    M = T.dynamic("M")
    steps = K // GROUP
    warpgroups = BM // 64
    producer = BM * 2  # first thread
    columns = -(-N // BN)
    straight = tuple(range(8 if steps % 8 == 0 else 4))  # ptxas serialises a wgmma still under way where a loop turns
    loads = next(i for i in (8, 7, 6, 4, 3, 2, 1) if steps // 4 % i == 0)  # of 16 bytes, under way at once
    ahead = 2 if 2 * BM * steps * 4 <= 32768 else 1  # tiles whose scales are there at once

    @T.macro
    def place(where, tile, bands, rank):
        """Row and column tile of a cluster's tile number."""
        band = tile // (panel * columns)
        inside = tile % (panel * columns)
        height = T.min(panel, bands - band * panel)
        where[0] = (band * panel + inside % height) * cluster + rank
        where[1] = inside // height

    @T.macro
    def release(freed, stage, tx):
        if tx % 32 == 0:
            if cluster == 1:
                T.barrier_arrive(freed[stage])
            else:
                for c in T.unroll(cluster):
                    T.mbarrier_arrive(freed[stage], c)

    @T.macro
    def start(g, at, x_tile, w_tile, filled, part):
        stage = at % stages
        T.barrier_wait(filled[stage], at // stages % 2)
        T.wgmma_gemm(
            x_tile[stage, g * 64 : g * 64 + 64, :], w_tile[stage, :, :], part, transpose_B=True, clear_accum=True
        )

    @T.macro
    def add(g, k, slot, part, total, scales):
        for i, j in T.Parallel(64, BN):
            total[i, j] += part[i, j] * scales[slot, k, g * 64 + i]

    @T.macro
    def worker(
        g, tx, where, tiles, bands, rank, first, stride, y, x_tile, w_tile, scales, y_tile, filled, freed, scaled,
        unscaled,
    ):  # fmt: skip
        parts = (T.alloc_fragment((64, BN), "float32"), T.alloc_fragment((64, BN), "float32"))
        total = T.alloc_fragment((64, BN), "float32")
        for n in T.serial(T.ceildiv(tiles - first, stride)):
            place(where, first + n * stride, bands, rank)
            at = n * steps
            slot = n % ahead
            T.clear(total)
            T.barrier_wait(scaled[slot], n // ahead % 2)
            for run in T.serial(steps // len(straight)):
                first_k = run * len(straight)
                start(g, at + first_k, x_tile, w_tile, filled, parts[0])
                for i in straight:
                    k = first_k + i
                    if i + 1 < len(straight):
                        start(g, at + k + 1, x_tile, w_tile, filled, parts[(i + 1) % 2])
                        T.wait_wgmma(1)
                    else:
                        T.wait_wgmma(0)
                    release(freed, (at + k) % stages, tx)
                    add(g, k, slot, parts[i % 2], total, scales)
            T.sync_threads(2 + g, 128)  # the last tile has left y_tile
            if tx % 32 == 0:
                T.barrier_arrive(unscaled[slot])
            T.copy(total, y_tile[g, :, :])
            T.fence_proxy_async()
            T.sync_threads(2 + g, 128)
            row = where[0] * BM + g * 64
            T.copy(y_tile[g, :, :], y[row : row + 64, where[1] * BN : where[1] * BN + BN])

    @T.prim_func
    def linear_fp8(
        x: T.Tensor((M, G * K), "float8_e4m3fn"),
        x_scale: T.Tensor((M, G * steps), "float32"),
        w: T.Tensor((N, K), "float8_e4m3fn"),
        w_scale: T.Tensor((-(-N // GROUP), steps), "float32"),
        y: T.Tensor((M, N), "bfloat16"),
    ):
        bands = T.ceildiv(M, BM * cluster)
        tiles = bands * columns
        with T.Kernel(T.min(blocks // cluster, tiles) * cluster, threads=producer + 128, cluster_dims=cluster) as block:
            x_tile = T.alloc_shared((stages, BM, GROUP), "float8_e4m3fn")
            w_tile = T.alloc_shared((stages, BN, GROUP), "float8_e4m3fn")
            scales = T.alloc_shared((ahead, steps, BM), "float32")
            y_tile = T.alloc_shared((warpgroups, 64, BN), "bfloat16")
            where = T.alloc_local((2,), "int32")
            four = T.alloc_local((4 * loads,), "float32")
            filled = T.alloc_barrier([32] * stages)
            arrivals = [4 * warpgroups * cluster] * stages
            freed = T.alloc_barrier(arrivals) if cluster == 1 else T.alloc_cluster_barrier(arrivals)
            scaled = T.alloc_barrier([64] * ahead)
            unscaled = T.alloc_barrier([4 * warpgroups] * ahead)
            tx = T.get_thread_binding()
            rank = block % cluster
            first = block // cluster
            stride = T.min(blocks // cluster, tiles)
            if cluster > 1:
                T.cluster_sync()  # nobody sends to a block whose barriers are not ready

            if tx >= producer:
                if BM > 64:
                    T.set_max_nreg(56, 0)
                if tx < producer + 32:
                    for n in T.serial(T.ceildiv(tiles - first, stride)):
                        place(where, first + n * stride, bands, rank)
                        for k in T.serial(steps):
                            at = n * steps + k
                            stage = at % stages
                            column = where[1] * BN // (N // G) * K + k * GROUP
                            T.barrier_wait(freed[stage], (at // stages + 1) % 2)
                            T.tma_copy(
                                x[where[0] * BM : where[0] * BM + BM, column : column + GROUP],
                                x_tile[stage, :, :],
                                barrier=filled[stage],
                            )
                            T.tma_copy(
                                w[where[1] * BN : where[1] * BN + BN, k * GROUP : k * GROUP + GROUP],
                                w_tile[stage, :, :],
                                barrier=filled[stage],
                                cluster_mask=None if cluster == 1 else (1 << cluster) - 1,
                            )
                            T.barrier_arrive(filled[stage])
                elif tx >= producer + 64:
                    for n in T.serial(T.ceildiv(tiles - first, stride)):
                        place(where, first + n * stride, bands, rank)
                        slot = n % ahead
                        group = where[1] * BN // (N // G)
                        T.barrier_wait(unscaled[slot], (n // ahead + 1) % 2)
                        for r in T.unroll(warpgroups):
                            row = r * 64 + tx - producer - 64
                            for batch in T.serial(steps // 4 // loads):
                                for i in T.unroll(loads):
                                    k = (batch * loads + i) * 4
                                    for v in T.vectorized(4):
                                        four[i * 4 + v] = x_scale[where[0] * BM + row, group * steps + k + v]
                                for i in T.unroll(loads * 4):
                                    k = batch * loads * 4 + i
                                    scales[slot, k, row] = four[i] * w_scale[where[1] * BN // GROUP, k]
                        T.barrier_arrive(scaled[slot])
            elif tx < 128:
                if BM > 64:
                    T.set_max_nreg(224, 1)
                worker(0, tx, where, tiles, bands, rank, first, stride, y, x_tile, w_tile, scales, y_tile, filled,
                       freed, scaled, unscaled)  # fmt: skip
            else:
                if BM > 64:
                    T.set_max_nreg(224, 1)
                worker(1, tx, where, tiles, bands, rank, first, stride, y, x_tile, w_tile, scales, y_tile, filled,
                       freed, scaled, unscaled)  # fmt: skip
            if cluster > 1:
                T.cluster_sync()  # nobody leaves while others may send

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
