"""FP8 linear maps of many tokens on Blackwell, as MXFP8 in clusters of two blocks that share one product.

A product of the pair is 256 tokens by 256 output channels by 32 channels: each block holds its own 128 tokens, its half
of the weight's rows, and the sums of its tokens in tensor memory. Block 0 issues for both. Block scales are powers of
two, one E8M0 byte for 128 channels; four of a row are a word, and the instruction's scale number picks one.

Warps: 0 copies tiles; 1 (of block 0) multiplies; 2 tells block 0 that tiles have come; 3 packs scales; 4 to 7 finish.

Legend: M tokens (dynamic), N output channels, K input channels, CLUSTERS pairs of blocks, G tiles of channels beside
each other.
"""

import tilelang.language as T

ROWS, COLUMNS, CHANNELS = 128, 256, 128  # of a block's tile, its pair's weight rows, and a step
PANEL = 4  # steps whose scales are one word
OUT = 64  # output channels that leave at once: 128 bytes of a row


def wait(barrier, turn):
    """Until phase number `turn` of the barrier is over: even ones from 0, odd ones are over before the first."""
    return T.mbarrier_wait_parity(barrier, turn & 1)


def scaled(N: int, K: int, CLUSTERS: int, G: int, stages: int, slots: int):
    """bf16 [M, N] = E4M3 [M, K] x E4M3 [N, K]; scales float32 [M, K / 128] and E8M0 [N / 128, K / 128].

    M is the token count; `stages` tiles of data and `slots` panels of scales are in flight.
    """
    M = T.dynamic("M")
    steps, panels, half = K // CHANNELS, K // CHANNELS // PANEL, COLUMNS // 2

    @T.prim_func
    def scaled_pairs(
        x: T.Tensor((M, K), "float8_e4m3fn"),
        x_scale: T.Tensor((M, K // 128), "float32"),
        w: T.Tensor((N, K), "float8_e4m3fn"),
        w_scale: T.Tensor((N // 128, K // 128), "uint8"),
        y: T.Tensor((M, N), "bfloat16"),
    ):
        with T.Kernel(2 * CLUSTERS, threads=256, cluster_dims=2) as block:
            rank = T.block_rank_in_cluster()
            T.assume(rank < 2)
            x_tile = T.alloc_shared((stages, ROWS, CHANNELS), "float8_e4m3fn")
            w_tile = T.alloc_shared((stages, half, CHANNELS), "float8_e4m3fn")
            x_words = T.alloc_shared((slots, ROWS), "uint32")
            w_words = T.alloc_shared((slots, COLUMNS), "uint32")
            sums = T.alloc_tmem([ROWS, COLUMNS], "float32")
            x_factors = T.alloc_tmem([ROWS, 4], "uint32")
            w_factors = T.alloc_tmem([ROWS, 8], "uint32")
            part = T.alloc_fragment((ROWS, OUT), "float32")
            out = T.alloc_shared((ROWS, OUT), "bfloat16")

            landed = T.alloc_barrier([32] * stages)  # this block's tiles
            filled = T.alloc_cluster_barrier([64] * stages)  # both blocks' tiles, in block 0
            freed = T.alloc_cluster_barrier([1] * stages)
            packed = T.alloc_cluster_barrier([64] * slots)  # both blocks' scales, in block 0
            taken = T.alloc_cluster_barrier([1] * slots)
            summed = T.alloc_cluster_barrier([1])
            read = T.alloc_cluster_barrier([256])  # both blocks' sums, in block 0

            tx = T.get_thread_binding()
            cluster = block // 2
            lines = T.ceildiv(M, 2 * ROWS)
            turns = T.ceildiv(lines * (N // COLUMNS) - cluster, CLUSTERS)

            if tx < 32:
                for turn in T.serial(turns):
                    tile = turn * CLUSTERS + cluster
                    row = (tile // G % lines * 2 + rank) * ROWS
                    line = (tile % G + tile // (G * lines) * G) * COLUMNS + rank * half
                    for k in T.serial(steps):
                        at = turn * steps + k
                        wait(freed[at % stages], at // stages + 1)
                        T.tma_copy(
                            x[row : row + ROWS, k * CHANNELS : k * CHANNELS + CHANNELS],
                            x_tile[at % stages, :, :],
                            barrier=landed[at % stages],
                        )
                        T.tma_copy(
                            w[line : line + half, k * CHANNELS : k * CHANNELS + CHANNELS],
                            w_tile[at % stages, :, :],
                            barrier=landed[at % stages],
                        )
                        T.mbarrier_arrive(landed[at % stages])
            elif tx < 64 and rank == 0:
                for turn in T.serial(turns):
                    wait(read, turn + 1)
                    for k in T.serial(steps):
                        at = turn * steps + k
                        if k % PANEL == 0:
                            group = turn * panels + k // PANEL
                            wait(packed[group % slots], group // slots)
                            T.tcgen05_cp_warpx4(x_words[group % slots, :], x_factors, use_2cta=True)
                            T.tcgen05_cp_warpx4(w_words[group % slots, :], w_factors, use_2cta=True)
                            T.tcgen05_mma_arrive(taken[group % slots], arrive_2cta=True)
                        wait(filled[at % stages], at // stages)
                        T.tcgen05_gemm_blockscaled(
                            x_tile[at % stages, :, :], w_tile[at % stages, :, :], sums, x_factors, w_factors,
                            transpose_B=True, clear_accum=k == 0, mbar=freed[at % stages], k_start=k * CHANNELS,
                            sf_a_granularity_k=128, sf_b_granularity_k=128, use_2cta=True,
                        )  # fmt: skip
                    T.tcgen05_mma_arrive(summed, arrive_2cta=True)
            elif tx >= 64 and tx < 96:
                for turn in T.serial(turns):
                    for k in T.serial(steps):
                        at = turn * steps + k
                        wait(landed[at % stages], at // stages)
                        T.mbarrier_arrive(filled[at % stages], 0)
            elif tx >= 96 and tx < 128:
                lane = tx - 96
                for turn in T.serial(turns):
                    tile = turn * CLUSTERS + cluster
                    row = (tile // G % lines * 2 + rank) * ROWS
                    line = (tile % G + tile // (G * lines) * G) * 2
                    for panel in T.serial(panels):
                        group = turn * panels + panel
                        words = T.alloc_local((4,), "uint32")
                        pair = T.alloc_local((2,), "uint32")
                        # row 32 i + lane of a tile is word 4 lane + i, as tensor memory takes them
                        for i in T.unroll(4):
                            words[i] = T.uint32(0)
                            if row + 32 * i + lane < M:
                                for j in T.unroll(4):
                                    bits = T.reinterpret(x_scale[row + 32 * i + lane, 4 * panel + j], "uint32")
                                    words[i] = words[i] | ((bits >> 23) << (8 * j))
                        for i in T.unroll(2):
                            pair[i] = T.uint32(0)
                            for j in T.unroll(4):
                                pair[i] = pair[i] | (T.cast(w_scale[line + i, 4 * panel + j], "uint32") << (8 * j))
                        wait(taken[group % slots], group // slots + 1)
                        for i in T.unroll(4):
                            x_words[group % slots, 4 * lane + i] = words[i]
                        for i in T.unroll(8):
                            w_words[group % slots, i // 4 * 128 + 4 * lane + i % 4] = pair[i // 4]
                        T.fence_proxy_async()
                        T.mbarrier_arrive(packed[group % slots], 0)
            elif tx >= 128:
                for turn in T.serial(turns):
                    tile = turn * CLUSTERS + cluster
                    row = (tile // G % lines * 2 + rank) * ROWS
                    line = (tile % G + tile // (G * lines) * G) * COLUMNS
                    wait(summed, turn)
                    for i in T.unroll(COLUMNS // OUT):
                        T.copy(sums[:, i * OUT : i * OUT + OUT], part)
                        if i == COLUMNS // OUT - 1:
                            T.tcgen05_before_thread_sync()
                            T.mbarrier_arrive(read, 0)
                        T.copy(part, out)
                        T.copy(out, y[row, line + i * OUT])

    return scaled_pairs
