"""A TileLang product on block-scaled tcgen05, as it should be and with each of the faults that compile silently."""

import tilelang.language as T


def scaled_product(dtype: str, group: int):
    """f32 [128, 128] = FP8 or FP4 [128, 128] x [128, 128] in tensor memory; a scale for `group` channels."""

    @T.prim_func
    def scaled_kernel(
        a: T.Tensor((128, 128), dtype), b: T.Tensor((128, 128), dtype), c: T.Tensor((128, 128), "float32")
    ):
        with T.Kernel(1, threads=128):
            x = T.alloc_shared((128, 128), dtype)
            w = T.alloc_shared((128, 128), dtype)
            y = T.alloc_tmem((128, 128), "float32")
            x_scale = T.alloc_tmem((128, 4), "uint32")
            w_scale = T.alloc_tmem((128, 4), "uint32")
            done = T.alloc_barrier(1)
            T.copy(a, x)
            T.copy(b, w)
            T.tcgen05_gemm_blockscaled(
                x, w, y, x_scale, w_scale, transpose_B=True, clear_accum=True, mbar=done, k_start=0,
                sf_a_granularity_k=group, sf_b_granularity_k=group,
            )  # fmt: skip
            T.mbarrier_wait_parity(done, 0)

    return scaled_kernel
