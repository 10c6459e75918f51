"""The noise of a draw, for (key, counter, token), as dsv4c/ops/sampling.py defines it.

Its bits are integer arithmetic and two roundings, the same everywhere. Two tokens share a 64-bit hash: 13 integer
instructions a token of 45 in all. Philox4x32-10 would take 11, and NumPy 97 us in place of 10 for 4096 tokens, a host's
whole sampling being 50.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

GAMMA: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)  # SplitMix64's increment
SHORT_2_32: tl.constexpr = tl.constexpr((1 - 2.0**-24) * 2.0**-32)  # a float32; times 2^32 it is below 1


@triton.jit
def mixed(stream, counter):
    """Number `counter` of a SplitMix64 stream, but for its last step; uint64."""
    z = stream + GAMMA + counter.to(tl.uint64) * GAMMA
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    return (z ^ (z >> 27)) * 0x94D049BB133111EB


@triton.jit
def row_stream(keys, counters, s):
    """The noise of row s: number counters[s] of stream keys[s]; uint64."""
    z = mixed(tl.load(keys + s).to(tl.uint64, bitcast=True), tl.load(counters + s))
    return z ^ (z >> 31)


@triton.jit
def words(stream, half):
    """The random bits of tokens 2 * half and 2 * half + 1; uint32."""
    z = mixed(stream, half)
    high = (z >> 32).to(tl.uint32)
    return z.to(tl.uint32) ^ (z >> 31).to(tl.uint32), high ^ (high >> 31)


@triton.jit
def exponential(word):
    """Noise of these random bits, in units of log 2."""
    past = (word.to(tl.float32) + 0.5) * SHORT_2_32
    # the card's logarithm is good to 2^-22 of 1, and 1 - past loses bits of what is small: there a minimax cubic
    near = past * (1.4426950 + past * (0.72136706 + past * (0.4793475 + past * 0.39949802)))
    return tl.where(past < 0.0625, near, -libdevice.fast_log2f(1.0 - past))


@triton.jit
def chunk_noise(stream, c, W: tl.constexpr):
    """The noise of every token of chunk c."""
    low, high = words(stream, c * (W // 2) + tl.arange(0, W // 2))
    return exponential(tl.interleave(low, high))


@triton.jit
def noise(stream, v):
    """The noise of tokens v."""
    low, high = words(stream, v >> 1)
    return exponential(tl.where((v & 1) != 0, high, low))
