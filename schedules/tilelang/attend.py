"""Sparse attention over packed FP8 pools: a window of entries, and picked (csa) or all completed (hca) ones.

A block of threads serves one token's 64 heads. One warpgroup gathers keys and turns them into half precision tiles of
64 keys; two warpgroups compute. Of each pair of tiles one computes the first's logits, the other the second's; they
agree on the maxima, and then each adds both tiles' values to its half of the channels.

Legend: T tokens, H heads, C channels of a head.
"""

import tilelang.language as T

KEYS = 64  # keys of a tile: with fewer, reading Q from shared memory holds the matrix unit back
HEADS = 64  # rows of a wgmma
LOG2_E = 1.4426950408889634
NOWHERE = -1.0e30  # the maximum of nothing: finite, so that it can be subtracted from itself
CHUNKS = 9  # times 16 bytes that each of four threads copies of an entry: 7 of E4M3, 2 of bfloat16
ENTRY = 576  # data bytes of an entry of 448 + 64 channels; the 8 bytes of its scales follow the data of its page
PACKED = 584


def _entry(at, per_page: int):
    """Byte offsets of the data and the scales of the entry in a pool's row `at`; `per_page` is a power of two."""
    start = T.Cast("int64", at >> (per_page.bit_length() - 1)) * (per_page * PACKED)
    inside = T.Cast("int64", at & (per_page - 1))
    return start + inside * ENTRY, start + per_page * ENTRY + inside * 8


def attend(kind: str, H: int, window: int, page: int, picks: int, per_page: int, ratio: int, splits: int):
    """`kind` is window, csa or hca; what a kind does not have is 0."""
    tokens, requests = T.dynamic("tokens"), T.dynamic("requests")
    columns, entry_columns = T.dynamic("columns"), T.dynamic("entry_columns")
    rows, entry_rows = T.dynamic("rows", "int64"), T.dynamic("entry_rows", "int64")
    C, half = 512, 256
    near = window // KEYS
    scale = C**-0.5 * LOG2_E

    @T.macro
    def choose(h, tile, pick, picked, t, tx):
        """Loads the picks of a tile, long before they are needed."""
        if kind == "csa":
            at = tile - near
            pick[h] = -1
            if at >= 0 and at < picks // KEYS:
                pick[h] = picked[t, at * KEYS + h * 32 + tx // 4]

    @T.macro
    def locate(h, tile, pick, row, pages, entry_pages, request, position, count, tx):
        """Pool rows of a tile's keys, -1 for a key that is not seen."""
        key = tile * KEYS + h * 32 + tx // 4
        if tile < near:
            at = position - (window - 1) + key
            row[h] = -1
            if at >= 0:
                row[h] = T.Cast("int32", pages[request, at // page]) * page + at % page
        else:
            if kind != "window":
                entry = pick[h] if kind == "csa" else key - window
                row[h] = -1
                if (entry >= 0) if kind == "csa" else (entry < count):
                    row[h] = T.Cast("int32", entry_pages[request, entry // per_page]) * per_page + entry % per_page

    @T.macro
    def fetch(h, tile, row, raw, exponents, pool, entry_pool, tx):
        """Starts the loads of one key; a key that is not seen is all 0."""
        if tile < near:
            data, scales = _entry(row[h], page)
            for i in T.unroll(CHUNKS):
                raw[h * 36 + i * 4 : h * 36 + i * 4 + 4] = T.ldg128(pool[data + i * 64 + tx % 4 * 16], row[h] >= 0)
            exponents[h * 2 : h * 2 + 2] = T.ldg64(pool[scales], row[h] >= 0)
        else:
            if kind != "window":
                data, scales = _entry(row[h], per_page)
                for i in T.unroll(CHUNKS):
                    raw[h * 36 + i * 4 : h * 36 + i * 4 + 4] = T.ldg128(
                        entry_pool[data + i * 64 + tx % 4 * 16], row[h] >= 0
                    )
                exponents[h * 2 : h * 2 + 2] = T.ldg64(entry_pool[scales], row[h] >= 0)

    @T.macro
    def convert(h, stage, k_tile, raw_8, raw_16, exponents_8, tx):
        """Writes one key of a tile in half precision; scales are powers of two, so only magnitudes over 57344 lose."""
        key = h * 32 + tx // 4
        for i in T.unroll(7):
            power = T.Cast("uint32", T.min(exponents_8[h * 8 + i], T.Cast("uint8", 127 + 7))) << 23
            gain = T.Cast("float16", T.reinterpret(power, "float32"))
            for v in T.vectorized(16):
                k_tile[stage, key, i * 64 + tx % 4 * 16 + v] = T.Cast("float16", raw_8[h * 144 + i * 16 + v]) * gain
        for i in T.unroll(2):
            for v in T.vectorized(8):
                k_tile[stage, key, 448 + i * 32 + tx % 4 * 8 + v] = T.Cast("float16", raw_16[h * 72 + 56 + i * 8 + v])

    @T.macro
    def logits(g, i, q_tile, k_tile, hidden, filled, s):
        T.barrier_wait(filled[g], i % 2)
        for r, c in T.Parallel(HEADS, KEYS):
            s[r, c] = hidden[g, c]
        T.wgmma_gemm(q_tile, k_tile[g, :, :], s, transpose_B=True)
        T.wait_wgmma(0)

    @T.macro
    def worker(g, q, t, first_head, mine, split, q_tile, k_tile, p_tile, hidden, peaks, sums, filled, freed, peak_in,
               p_in, sink, out):  # fmt: skip
        other = 1 - g
        o = T.alloc_fragment((HEADS, half), "float32")
        s = T.alloc_fragment((HEADS, KEYS), "float32")
        m = T.alloc_fragment((HEADS,), "float32")
        top = T.alloc_fragment((HEADS,), "float32")
        part = T.alloc_fragment((HEADS,), "float32")
        total = T.alloc_fragment((HEADS,), "float32")
        T.copy(q[t, first_head : first_head + HEADS, g * half : g * half + half], q_tile[:, g * half : g * half + half])
        T.fence_proxy_async()
        T.fill(o, 0)
        for r in T.Parallel(HEADS):
            m[r] = T.max(sink[first_head + r] * LOG2_E, NOWHERE) if splits == 1 else NOWHERE
        for r in T.Parallel(HEADS):
            total[r] = T.exp2(sink[first_head + r] * LOG2_E - m[r]) if g == 0 and splits == 1 else 0.0
        T.sync_threads(1, 256)
        for i in T.serial(T.ceildiv(mine, 2)):
            both = 2 * i + 1 < mine
            T.copy(m, top)
            if g == 0:
                logits(g, i, q_tile, k_tile, hidden, filled, s)
                T.reduce_max(s, part, dim=1)
                for r in T.Parallel(HEADS):
                    top[r] = T.max(top[r], part[r] * scale)
            else:
                if both:
                    logits(g, i, q_tile, k_tile, hidden, filled, s)
                    T.reduce_max(s, part, dim=1)
                    for r in T.Parallel(HEADS):
                        top[r] = T.max(top[r], part[r] * scale)
            T.copy(top, peaks[g, :])
            T.barrier_arrive(peak_in[g])
            T.barrier_wait(peak_in[other], i % 2)
            for r in T.Parallel(HEADS):
                top[r] = T.max(top[r], peaks[other, r])
            for r in T.Parallel(HEADS):
                m[r] = T.exp2(m[r] - top[r])
            for r in T.Parallel(HEADS):
                total[r] *= m[r]
            for r, c in T.Parallel(HEADS, half):
                o[r, c] *= m[r]
            T.copy(top, m)
            if g == 0:
                for r, c in T.Parallel(HEADS, KEYS):
                    s[r, c] = T.exp2(s[r, c] * scale - m[r])
                T.copy(s, p_tile[g, :, :])
                T.fence_proxy_async()
                T.barrier_arrive(p_in[g])
                T.wgmma_gemm(p_tile[g, :, :], k_tile[g, :, g * half : g * half + half], o)
                T.reduce_sum(s, part, dim=1)
                for r in T.Parallel(HEADS):
                    total[r] += part[r]
                if both:
                    T.barrier_wait(p_in[other], i % 2)
                    T.wgmma_gemm(p_tile[other, :, :], k_tile[other, :, g * half : g * half + half], o)
                    T.wait_wgmma(1)
                    T.barrier_arrive(freed[g])
                    T.wait_wgmma(0)
                    T.barrier_arrive(freed[other])
                else:
                    T.wait_wgmma(0)
            else:
                if both:
                    for r, c in T.Parallel(HEADS, KEYS):
                        s[r, c] = T.exp2(s[r, c] * scale - m[r])
                    T.copy(s, p_tile[g, :, :])
                    T.fence_proxy_async()
                    T.barrier_arrive(p_in[g])
                    T.wgmma_gemm(p_tile[g, :, :], k_tile[g, :, g * half : g * half + half], o)
                    T.reduce_sum(s, part, dim=1)
                    for r in T.Parallel(HEADS):
                        total[r] += part[r]
                    T.barrier_wait(p_in[other], i % 2)
                    T.wgmma_gemm(p_tile[other, :, :], k_tile[other, :, g * half : g * half + half], o)
                    T.wait_wgmma(1)
                    T.barrier_arrive(freed[g])
                    T.wait_wgmma(0)
                    T.barrier_arrive(freed[other])
                else:
                    T.barrier_wait(p_in[other], i % 2)
                    T.wgmma_gemm(p_tile[other, :, :], k_tile[other, :, g * half : g * half + half], o)
                    T.wait_wgmma(0)
        T.copy(total, sums[g, :])
        T.sync_threads(1, 256)
        for r in T.Parallel(HEADS):
            total[r] = 1.0 / (total[r] + sums[other, r])
        for r, c in T.Parallel(HEADS, half):
            o[r, c] *= total[r]
        T.copy(o, out[t, first_head : first_head + HEADS, g * half : g * half + half])

    @T.macro
    def body(q, pool, pages, entry_pool, entry_pages, picked, request_rows, positions, sink, out):
        with T.Kernel(H // HEADS * splits, tokens, threads=384) as (bx, t):
            q_tile = T.alloc_shared((HEADS, C), "float16")
            k_tile = T.alloc_shared((2, KEYS, C), "float16")
            p_tile = T.alloc_shared((2, HEADS, KEYS), "float16")
            hidden = T.alloc_shared((2, KEYS), "float32")  # 0 for a key that is seen, else -inf
            peaks = T.alloc_shared((2, HEADS), "float32")
            sums = T.alloc_shared((2, HEADS), "float32")
            filled = T.alloc_barrier([128, 128])
            freed = T.alloc_barrier([256, 256])
            peak_in = T.alloc_barrier([128, 128])
            p_in = T.alloc_barrier([128, 128])
            tx = T.get_thread_binding()
            first_head = bx // splits * HEADS
            split = bx % splits
            position = T.Cast("int32", positions[t])
            request = T.Cast("int32", request_rows[t])
            count = (position + 1) // ratio if kind == "hca" else 0
            tiles = near + (T.ceildiv(count, KEYS) if kind == "hca" else picks // KEYS)
            share = T.ceildiv(tiles, splits)
            begin = T.min(split * share, tiles)
            mine = T.min(share, tiles - begin)

            if tx >= 256:
                T.set_max_nreg(120, 0)
                raw = T.alloc_local((2 * 36,), "uint32")
                raw_8 = T.view(raw, (2 * 144,), "float8_e4m3fn")
                raw_16 = T.view(raw, (2 * 72,), "bfloat16")
                exponents = T.alloc_local((2 * 2,), "uint32")
                exponents_8 = T.view(exponents, (16,), "uint8")
                row = T.alloc_local((2,), "int32")
                seen = T.alloc_local((2,), "int32")
                pick = T.alloc_local((2,), "int32")
                for h in T.unroll(2):
                    choose(h, begin, pick, picked, t, tx)
                for h in T.unroll(2):
                    locate(h, begin, pick, row, pages, entry_pages, request, position, count, tx)
                    choose(h, begin + 1, pick, picked, t, tx)
                for h in T.unroll(2):
                    fetch(h, begin, row, raw, exponents, pool, entry_pool, tx)
                    seen[h] = row[h]
                for n in T.serial(mine):
                    for h in T.unroll(2):
                        locate(h, begin + n + 1, pick, row, pages, entry_pages, request, position, count, tx)
                        choose(h, begin + n + 2, pick, picked, t, tx)
                    T.barrier_wait(freed[n % 2], (n // 2 + 1) % 2)
                    for h in T.unroll(2):
                        if tx % 4 == 0:
                            hidden[n % 2, h * 32 + tx // 4] = T.if_then_else(seen[h] >= 0, 0.0, -T.infinity("float32"))
                        convert(h, n % 2, k_tile, raw_8, raw_16, exponents_8, tx)
                        if n + 1 < mine:
                            fetch(h, begin + n + 1, row, raw, exponents, pool, entry_pool, tx)
                            seen[h] = row[h]
                    T.fence_proxy_async()
                    T.barrier_arrive(filled[n % 2])
            elif tx < 128:
                T.set_max_nreg(192, 1)
                worker(0, q, t, first_head, mine, split, q_tile, k_tile, p_tile, hidden, peaks, sums, filled, freed,
                       peak_in, p_in, sink, out)  # fmt: skip
            else:
                T.set_max_nreg(192, 1)
                worker(1, q, t, first_head, mine, split, q_tile, k_tile, p_tile, hidden, peaks, sums, filled, freed,
                       peak_in, p_in, sink, out)  # fmt: skip

    if kind == "window":

        @T.prim_func
        def attend_window(
            q: T.Tensor((tokens, H, C), "bfloat16"),
            pool: T.Tensor((rows * PACKED,), "uint8"),
            pages: T.Tensor((requests, columns), "int64"),
            request_rows: T.Tensor((tokens,), "int64"),
            positions: T.Tensor((tokens,), "int64"),
            sink: T.Tensor((H,), "float32"),
            out: T.Tensor((tokens, H, C), "bfloat16"),
        ):
            body(q, pool, pages, None, None, None, request_rows, positions, sink, out)

        return attend_window

    if kind == "csa":

        @T.prim_func
        def attend_csa(
            q: T.Tensor((tokens, H, C), "bfloat16"),
            pool: T.Tensor((rows * PACKED,), "uint8"),
            pages: T.Tensor((requests, columns), "int64"),
            entry_pool: T.Tensor((entry_rows * PACKED,), "uint8"),
            entry_pages: T.Tensor((requests, entry_columns), "int64"),
            picked: T.Tensor((tokens, picks), "int32"),
            request_rows: T.Tensor((tokens,), "int64"),
            positions: T.Tensor((tokens,), "int64"),
            sink: T.Tensor((H,), "float32"),
            out: T.Tensor((tokens, H, C), "bfloat16"),
        ):
            body(q, pool, pages, entry_pool, entry_pages, picked, request_rows, positions, sink, out)

        return attend_csa

    @T.prim_func
    def attend_hca(
        q: T.Tensor((tokens, H, C), "bfloat16"),
        pool: T.Tensor((rows * PACKED,), "uint8"),
        pages: T.Tensor((requests, columns), "int64"),
        entry_pool: T.Tensor((entry_rows * PACKED,), "uint8"),
        entry_pages: T.Tensor((requests, entry_columns), "int64"),
        request_rows: T.Tensor((tokens,), "int64"),
        positions: T.Tensor((tokens,), "int64"),
        sink: T.Tensor((H,), "float32"),
        out: T.Tensor((tokens, H, C), "bfloat16"),
    ):
        body(q, pool, pages, entry_pool, entry_pages, None, request_rows, positions, sink, out)

    return attend_hca
