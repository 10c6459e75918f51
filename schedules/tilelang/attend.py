"""Sparse attention over packed FP8 pools: a window of entries, and picked (csa) or all completed (hca) ones.

A block of threads serves one token's 64 heads. Two warpgroups gather keys and turn them into half precision tiles of
64 keys; two others compute. Of each pair of tiles one computes the first's logits, the other the second's; they
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
    def choose(tile, tiles, pick, picked, t, key):
        """Starts loading a tile's picks."""
        if kind == "csa":
            pick[0] = T.ldg32(picked[t, (tile - near) * KEYS + key], tile >= near and tile < tiles)

    @T.macro
    def look_up(tile, tiles, pick, entry, page_of, pages, entry_pages, request, position, count, key):
        """A tile's entries (-1: not seen), and starts loading the pages they are in."""
        if tile < near:
            entry[0] = position - (window - 1) + tile * KEYS + key
            page_of[0] = T.ldg32(pages[request, T.max(entry[0], 0) // page], entry[0] >= 0)
        else:
            if kind == "csa":
                entry[0] = T.if_then_else(tile < tiles, T.reinterpret(pick[0], "int32"), -1)
            if kind == "hca":
                entry[0] = tile * KEYS + key - window
                entry[0] = T.if_then_else(entry[0] < count, entry[0], -1)
            if kind == "window":
                entry[0] = -1
            else:
                page_of[0] = T.ldg32(entry_pages[request, T.max(entry[0], 0) // per_page], entry[0] >= 0)

    def place(buffer, page_of, entry, per_page_):
        """Address of an entry's data; `per_page_` is a power of two."""
        start = T.Cast("int64", page_of) * (per_page_ * PACKED) + (entry & (per_page_ - 1)) * ENTRY
        return T.call_extern("int64", "reinterpret_cast<int64_t>", T.access_ptr(buffer[start], "r"))

    def locate(tile, entry, page_of, pool, entry_pool):
        """The same of a tile's key, in one pool or the other, so that one pair of registers holds it."""
        data = place(pool, page_of, entry, page)
        return (
            data if kind == "window" else T.if_then_else(tile < near, data, place(entry_pool, page_of, entry, per_page))
        )

    def behind(tile, entry):
        """How far behind an entry's data its scales are: after all data of the page."""
        of = page if kind == "window" else T.if_then_else(tile < near, page, per_page)
        return of * ENTRY - (entry & (of - 1)) * (ENTRY - 8)

    def load(dtype, op, at, seen):
        """Starts a load; a key that is not seen gives zeros."""
        pointer = T.call_extern("handle", "reinterpret_cast<void*>", at)
        return T.call_intrin(dtype, tirx.op.Op.get(op), pointer, seen)

    @T.macro
    def convert(i, stage, k_tile, raw_8, raw_16, exponents_8, key, lane):
        """Writes 16 bytes of a key in half precision: scales are powers of two, only entries over 57344 do not fit."""
        if i < 7:
            power = T.Cast("uint32", T.min(exponents_8[i], T.Cast("uint8", 127 + 7))) << 23
            gain = T.Cast("float16", T.reinterpret(power, "float32"))
            for v in T.vectorized(16):
                k_tile[stage, key, i * 64 + lane * 16 + v] = T.Cast("float16", raw_8[i * 16 + v]) * gain
        else:
            for v in T.vectorized(8):
                k_tile[stage, key, 448 + (i - 7) * 32 + lane * 8 + v] = T.Cast("float16", raw_16[i * 8 + v])

    @T.macro
    def tell(n, entry, hidden, key, lane):
        if lane == 0:
            hidden[n % 4, key] = T.if_then_else(entry[0] >= 0, 0.0, -T.infinity("float32"))

    @T.macro
    def producer(tx, t, begin, mine, tiles, request, position, count, pool, pages, entry_pool, entry_pages, picked,
                 k_tile, hidden, filled, freed):  # fmt: skip
        """Four threads turn a key; lookups run two tiles ahead, loads and what is hidden one."""
        key, lane = (tx - 256) // 4, tx % 4
        raw = T.alloc_local((4 * CHUNKS,), "uint32")
        raw_8 = T.view(raw, (16 * CHUNKS,), "float8_e4m3fn")
        raw_16 = T.view(raw, (8 * CHUNKS,), "bfloat16")
        exponents = T.alloc_local((2,), "uint32")
        exponents_8 = T.view(exponents, (8,), "uint8")
        pick = T.alloc_local((1,), "uint32")
        entry = T.alloc_local((1,), "int32")
        page_of = T.alloc_local((1,), "uint32")
        at = T.alloc_local((1,), "int64")
        pick[0] = 0
        page_of[0] = 0
        choose(begin, tiles, pick, picked, t, key)
        look_up(begin, tiles, pick, entry, page_of, pages, entry_pages, request, position, count, key)
        choose(begin + 1, tiles, pick, picked, t, key)
        at[0] = locate(begin, entry[0], page_of[0], pool, entry_pool) + lane * 16
        for i in T.unroll(CHUNKS):
            raw[i * 4 : i * 4 + 4] = load("uint32x4", "tl.ldg128", at[0] + i * 64, entry[0] >= 0)
        exponents[0:2] = load("uint32x2", "tl.ldg64", at[0] - lane * 16 + behind(begin, entry[0]), entry[0] >= 0)
        tell(0, entry, hidden, key, lane)
        look_up(begin + 1, tiles, pick, entry, page_of, pages, entry_pages, request, position, count, key)
        choose(begin + 2, tiles, pick, picked, t, key)
        for n in T.serial(mine):
            T.barrier_wait(freed[n % 2], (n // 2 + 1) % 2)
            tell(n + 1, entry, hidden, key, lane)
            at[0] = locate(begin + n + 1, entry[0], page_of[0], pool, entry_pool) + lane * 16
            for i in T.unroll(CHUNKS):
                convert(i, n % 2, k_tile, raw_8, raw_16, exponents_8, key, lane)
                raw[i * 4 : i * 4 + 4] = load("uint32x4", "tl.ldg128", at[0] + i * 64, entry[0] >= 0)
            T.fence_proxy_async()
            T.barrier_arrive(filled[n % 2])
            scales = at[0] - lane * 16 + behind(begin + n + 1, entry[0])
            exponents[0:2] = load("uint32x2", "tl.ldg64", scales, entry[0] >= 0)
            look_up(begin + n + 2, tiles, pick, entry, page_of, pages, entry_pages, request, position, count, key)
            choose(begin + n + 3, tiles, pick, picked, t, key)

    @T.macro
    def logits(g, i, q_tile, k_tile, hidden, filled, s):
        T.barrier_wait(filled[g], i % 2)
        for r, c in T.Parallel(HEADS, KEYS):
            s[r, c] = hidden[(2 * i + g) % 4, c]
        T.wgmma_gemm(q_tile, k_tile[g, :, :], s, transpose_B=True)
        T.wait_wgmma(0)

    @T.macro
    def values(g, tile, p_tile, k_tile, o):
        """Starts adding a tile's weighted values to this warpgroup's half of the channels."""
        first = g * half
        T.wgmma_gemm(p_tile[tile, :, :], k_tile[tile, :, first : first + half // 2], o[0])
        T.wgmma_gemm(p_tile[tile, :, :], k_tile[tile, :, first + half // 2 : first + half], o[1])

    @T.macro
    def scale_by(o, factor):
        for r, c in T.Parallel(HEADS, half // 2):
            o[r, c] *= factor[r]

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
        scale_by(o[0], part)
        scale_by(o[1], part)
        # All blocks have told their sums, so nobody reads keys any more: their tiles carry the parts.
        T.copy(o[0], k_tile[0, :, g * half : g * half + half // 2])
        T.copy(o[1], k_tile[0, :, g * half + half // 2 : g * half + half])
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
        o = (T.alloc_fragment((HEADS, half // 2), "float32"), T.alloc_fragment((HEADS, half // 2), "float32"))
        s = T.alloc_fragment((HEADS, KEYS), "float32")
        m = T.alloc_fragment((HEADS,), "float32")
        top = T.alloc_fragment((HEADS,), "float32")
        part = T.alloc_fragment((HEADS,), "float32")
        total = T.alloc_fragment((HEADS,), "float32")
        T.copy(q[t, first_head : first_head + HEADS, g * half : g * half + half], q_tile[:, g * half : g * half + half])
        T.fence_proxy_async()
        T.fill(o[0], 0)
        T.fill(o[1], 0)
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
            scale_by(o[0], m)
            scale_by(o[1], m)
            T.copy(top, m)
            if g == 0:
                for r, c in T.Parallel(HEADS, KEYS):
                    s[r, c] = T.exp2(s[r, c] * scale - m[r])
                T.copy(s, p_tile[g, :, :])
                T.fence_proxy_async()
                T.barrier_arrive(p_in[g])
                values(g, g, p_tile, k_tile, o)
                T.reduce_sum(s, part, dim=1)
                for r in T.Parallel(HEADS):
                    total[r] += part[r]
                if both:
                    T.barrier_wait(p_in[other], i % 2)
                    values(g, other, p_tile, k_tile, o)
                    T.wait_wgmma(2)
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
                    values(g, g, p_tile, k_tile, o)
                    T.reduce_sum(s, part, dim=1)
                    for r in T.Parallel(HEADS):
                        total[r] += part[r]
                    T.barrier_wait(p_in[other], i % 2)
                    values(g, other, p_tile, k_tile, o)
                    T.wait_wgmma(2)
                    T.barrier_arrive(freed[g])
                    T.wait_wgmma(0)
                    T.barrier_arrive(freed[other])
                else:
                    T.barrier_wait(p_in[other], i % 2)
                    values(g, other, p_tile, k_tile, o)
                    T.wait_wgmma(0)
        T.copy(total, sums[g, :])
        T.sync_threads(1, 256)
        for r in T.Parallel(HEADS):
            total[r] += sums[other, r]
        if splits == 1:
            for r in T.Parallel(HEADS):
                total[r] = 1.0 / total[r]
            scale_by(o[0], total)
            scale_by(o[1], total)
            first = g * half
            T.copy(o[0], out[t, first_head : first_head + HEADS, first : first + half // 2])
            T.copy(o[1], out[t, first_head : first_head + HEADS, first + half // 2 : first + half])
        else:
            join(g, t, tx, first_head, split, o, m, top, part, total, k_tile, mine_of, stats, told, landed, sink, out)

    @T.macro
    def body(q, pool, pages, entry_pool, entry_pages, picked, request_rows, positions, sink, out):
        with T.Kernel(H // HEADS * splits, tokens, threads=512, cluster_dims=splits) as (bx, t):
            q_tile = T.alloc_shared((HEADS, C), "float16")
            k_tile = T.alloc_shared((2, KEYS, C), "float16")
            p_tile = T.alloc_shared((2, HEADS, KEYS), "float16")
            hidden = T.alloc_shared((4, KEYS), "float32")  # 0 for a key that is seen, else -inf
            peaks = T.alloc_shared((2, HEADS), "float32")
            sums = T.alloc_shared((2, HEADS), "float32")
            filled = T.alloc_barrier([256, 256])
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
            begin = split * tiles // splits
            mine = (split + 1) * tiles // splits - begin
            if splits > 1:
                T.cluster_sync()  # nobody sends to a block whose barriers are not ready

            if tx >= 256:
                T.set_max_nreg(64, 0)
                producer(tx, t, begin, mine, tiles, request, position, count, pool, pages, entry_pool, entry_pages,
                         picked, k_tile, hidden, filled, freed)  # fmt: skip
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
