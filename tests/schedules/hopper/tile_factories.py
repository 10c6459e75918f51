"""Small TileLang kernels for the tests, one for each thing a launch record must say or a lowering must refuse."""

import tilelang.language as T


def product(N: int, K: int, BM: int, BN: int, stages: int = 2, waits: bool = False, cluster: int = 1):
    """f32 [M, N] = bf16 [M, K] x bf16 [N, K], pipelined by TileLang itself."""
    M = T.dynamic("M")

    @T.prim_func
    def product_kernel(
        a: T.Tensor((M, K), "bfloat16"), b: T.Tensor((N, K), "bfloat16"), c: T.Tensor((M, N), "float32")
    ):
        with T.Kernel(T.ceildiv(M, BM), T.ceildiv(N, BN), threads=128, cluster_dims=(1, cluster, 1)) as (bm, bn):
            x = T.alloc_shared((BM, 64), "bfloat16")
            w = T.alloc_shared((BN, 64), "bfloat16")
            y = T.alloc_fragment((BM, BN), "float32")
            T.clear(y)
            if waits:
                T.pdl_sync()
            for k in T.Pipelined(K // 64, num_stages=stages):
                T.copy(a[bm * BM, k * 64], x)
                T.copy(b[bn * BN, k * 64], w)
                T.gemm(x, w, y, transpose_B=True)
            T.copy(y, c[bm * BM, bn * BN])

    return product_kernel


def scale(D: int, rows: int):
    """y = x * rows, by elements: pointers and sizes, no tensor map."""
    M = T.dynamic("M")

    @T.prim_func
    def scale_kernel(x: T.Tensor((M, D), "float32"), y: T.Tensor((M, D), "float32")):
        with T.Kernel(T.ceildiv(M, rows), threads=128) as block:
            for i, j in T.Parallel(rows, D):
                if block * rows + i < M:
                    y[block * rows + i, j] = x[block * rows + i, j] * rows

    return scale_kernel
