"""Sparse attention over packed FP8 pools: a window of entries, and picked (csa) or all completed (hca) ones.

A block of threads serves one token's 64 heads. One warpgroup gathers keys and turns them into half precision tiles of
64 keys; two warpgroups compute. Of each pair of tiles one computes the first's logits, the other the second's; they
agree on the maxima, and then each adds both tiles' values to its half of the channels.

Legend: T tokens, H heads, C channels of a head.
"""

import tilelang.language as T
from tvm import tirx

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
    wide = C // splits

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
    def send(k_tile, split, to, landed):
        """Columns of a tile of 64 rows lie together, 64 at a time: any multiple of them is one piece of memory."""
        size = HEADS * wide
        T.call_intrin(
            "handle",
            tirx.op.Op.get("tl.tma_store_cluster"),
            T.access_ptr(k_tile[1, 0, split * wide], "w", size),
            T.access_ptr(k_tile[0, 0, to * wide], "r", size),
            to,
            T.uint32(2 * size),
            landed[0],
        )

    @T.macro
    def join(g, t, tx, first_head, split, o, m, top, part, total, k_tile, mine_of, stats, told, landed, sink, out):
        """Adds up the cluster's parts: block i gathers channels [i * wide, (i + 1) * wide) of all of them."""
        if g == 0:
            T.copy(m, mine_of[0, :])
            T.copy(total, mine_of[1, :])
            T.fence_proxy_async()
            T.sync_threads(2, 128)
            for c in T.unroll(splits):
                T.copy_cluster(mine_of, stats[split, :, :], dst_block=c, remote_barrier=told[0])
        T.barrier_wait(told[0], 0)
        for r in T.Parallel(HEADS):
            top[r] = T.max(sink[first_head + r] * LOG2_E, NOWHERE)
        for c in T.unroll(splits):
            for r in T.Parallel(HEADS):
                top[r] = T.max(top[r], stats[c, 0, r])
        for r in T.Parallel(HEADS):
            total[r] = T.exp2(sink[first_head + r] * LOG2_E - top[r])
        for c in T.unroll(splits):
            for r in T.Parallel(HEADS):
                total[r] += stats[c, 1, r] * T.exp2(stats[c, 0, r] - top[r])
        for r in T.Parallel(HEADS):
            part[r] = T.exp2(m[r] - top[r]) / total[r]
        for r, c in T.Parallel(HEADS, half):
            o[r, c] *= part[r]
        # All blocks have told their sums, so nobody reads keys any more: their tiles carry the parts.
        T.copy(o, k_tile[0, :, g * half : g * half + half])
        T.fence_proxy_async()
        T.sync_threads(1, 256)
        if g == 0 and tx == 0:
            for c in T.unroll(splits):
                send(k_tile, split, c, landed)
        T.barrier_wait(landed[0], 0)
        rows_each = HEADS // 2
        piece = T.alloc_fragment((rows_each, wide), "float16")
        added = T.alloc_fragment((rows_each, wide), "float32")
        T.fill(added, 0)
        for c in T.unroll(splits):
            T.copy(k_tile[1, g * rows_each : g * rows_each + rows_each, c * wide : c * wide + wide], piece)
            for i, j in T.Parallel(rows_each, wide):
                added[i, j] += T.Cast("float32", piece[i, j])
        first = first_head + g * rows_each
        T.copy(added, out[t, first : first + rows_each, split * wide : split * wide + wide])

    @T.macro
    def worker(g, q, t, tx, first_head, mine, split, q_tile, k_tile, p_tile, hidden, peaks, sums, filled, freed,
               peak_in, p_in, mine_of, stats, told, landed, sink, out):  # fmt: skip
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
            total[r] += sums[other, r]
        if splits == 1:
            for r in T.Parallel(HEADS):
                total[r] = 1.0 / total[r]
            for r, c in T.Parallel(HEADS, half):
                o[r, c] *= total[r]
            T.copy(o, out[t, first_head : first_head + HEADS, g * half : g * half + half])
        else:
            join(g, t, tx, first_head, split, o, m, top, part, total, k_tile, mine_of, stats, told, landed, sink, out)

    @T.macro
    def body(q, pool, pages, entry_pool, entry_pages, picked, request_rows, positions, sink, out):
        with T.Kernel(H // HEADS * splits, tokens, threads=384, cluster_dims=splits) as (bx, t):
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
            mine_of = T.alloc_shared((2, HEADS), "float32")  # maxima and sums: a block's own, and the cluster's
            stats = T.alloc_shared((splits, 2, HEADS), "float32")
            told = T.alloc_barrier(splits)
            landed = T.alloc_barrier(splits)
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

            if splits > 1:
                T.cluster_sync()  # nobody sends to a block whose barriers are not ready

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
                    choose(h, begin, pick, picked, t, tx - 256)
                for h in T.unroll(2):
                    locate(h, begin, pick, row, pages, entry_pages, request, position, count, tx - 256)
                    choose(h, begin + 1, pick, picked, t, tx - 256)
                for h in T.unroll(2):
                    fetch(h, begin, row, raw, exponents, pool, entry_pool, tx - 256)
                    seen[h] = row[h]
                for n in T.serial(mine):
                    for h in T.unroll(2):
                        locate(h, begin + n + 1, pick, row, pages, entry_pages, request, position, count, tx - 256)
                        choose(h, begin + n + 2, pick, picked, t, tx - 256)
                    T.barrier_wait(freed[n % 2], (n // 2 + 1) % 2)
                    for h in T.unroll(2):
                        if tx % 4 == 0:
                            hidden[n % 2, h * 32 + (tx - 256) // 4] = T.if_then_else(
                                seen[h] >= 0, 0.0, -T.infinity("float32")
                            )
                        convert(h, n % 2, k_tile, raw_8, raw_16, exponents_8, tx - 256)
                        if n + 1 < mine:
                            fetch(h, begin + n + 1, row, raw, exponents, pool, entry_pool, tx - 256)
                            seen[h] = row[h]
                    T.fence_proxy_async()
                    T.barrier_arrive(filled[n % 2])
            elif tx < 128:
                T.set_max_nreg(192, 1)
                worker(0, q, t, tx, first_head, mine, split, q_tile, k_tile, p_tile, hidden, peaks, sums, filled, freed,
                       peak_in, p_in, mine_of, stats, told, landed, sink, out)  # fmt: skip
            else:
                T.set_max_nreg(192, 1)
                worker(1, q, t, tx, first_head, mine, split, q_tile, k_tile, p_tile, hidden, peaks, sums, filled, freed,
                       peak_in, p_in, mine_of, stats, told, landed, sink, out)  # fmt: skip

            if splits > 1:
                T.cluster_sync()  # what a block sends must be read before it is gone

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
