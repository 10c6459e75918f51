"""The passes, one a file, and the default pipeline as a table of contents. The order is solved from facts."""

from __future__ import annotations

from collections.abc import Mapping

from dsv4c.passes.append_drafts import AppendDrafts
from dsv4c.passes.append_sampling import AppendSampling
from dsv4c.passes.canonicalize import Canonicalize
from dsv4c.passes.check_lowered import CheckLowered
from dsv4c.passes.flatten_streams import FlattenStreams
from dsv4c.passes.fuse_hc_head_norm import FuseHcHeadNorm
from dsv4c.passes.fuse_hc_norm import FuseHcNorm
from dsv4c.passes.fuse_hc_post_pre import FuseHcPostPre
from dsv4c.passes.fuse_head_rope import FuseHeadRope
from dsv4c.passes.fuse_linears import FuseLinears
from dsv4c.passes.fuse_norm_rope_write import FuseNormRopeWrite
from dsv4c.passes.fuse_quantise import FuseQuantise
from dsv4c.passes.fuse_stored_linears import FuseStoredLinears
from dsv4c.passes.narrow_activations import NarrowActivations
from dsv4c.passes.pack_state import PackState
from dsv4c.passes.quantise import Quantise
from dsv4c.passes.quantise_activations import QuantiseActivations
from dsv4c.passes.raise_attention import RaiseAttention
from dsv4c.passes.raise_compressor import RaiseCompressor
from dsv4c.passes.raise_dspark import RaiseDspark
from dsv4c.passes.raise_embedding import RaiseEmbedding
from dsv4c.passes.raise_hyper import RaiseHyper
from dsv4c.passes.raise_indexer import RaiseIndexer
from dsv4c.passes.raise_linear import RaiseLinear
from dsv4c.passes.raise_moe import RaiseMoe
from dsv4c.passes.raise_mtp import RaiseMtp
from dsv4c.passes.raise_norm import RaiseNorm
from dsv4c.passes.raise_paging import RaisePaging
from dsv4c.passes.raise_quant import RaiseQuant
from dsv4c.passes.raise_rope import RaiseRope
from dsv4c.passes.stitch import Stitch
from dsv4c.passes.store_experts import StoreExperts
from dsv4c.passes.store_linears import StoreLinears
from dsv4c.pipeline import Pass, Pipeline

RAISE: tuple[Pass, ...] = (
    Canonicalize(),
    RaiseEmbedding(),
    RaiseRope(),
    RaisePaging(),
    RaiseHyper(),
    RaiseNorm(),
    RaiseLinear(),
    RaiseQuant(),
    RaiseCompressor(),
    RaiseIndexer(),
    RaiseAttention(),
    RaiseMoe(),
    RaiseMtp(),
    RaiseDspark(),
    Stitch(),
)
FUSE: tuple[Pass, ...] = (
    FuseHcNorm(),
    FuseHcPostPre(),
    FuseHcHeadNorm(),
    FuseHeadRope(),
    FuseNormRopeWrite(),
)
WIDEN: tuple[Pass, ...] = (FuseLinears(),)
"""For targets that widen weights and state to float32 (CPUs)."""
STORE: tuple[Pass, ...] = (
    FuseStoredLinears(),
    PackState(),
    StoreLinears(),
    StoreExperts(),
    FuseQuantise(),
    NarrowActivations(),
)
"""For targets that compute on what the checkpoint stores (GPUs)."""


SCALED: tuple[Pass, ...] = (QuantiseActivations(),)
"""For GPUs whose matrix units take FP4 weights with narrow activations (Blackwell)."""
_SCALED = ("sm_100a", "sm_103a")


def default_pipeline(
    formats: Mapping[str, str] | None = None, arch: str = "cpu", drafts: int = 0, max_context: int = 0
) -> Pipeline:  # fmt: skip
    """From a captured program to a lowered one. `formats`: how the checkpoint stores each weight (None: as usual).

    `drafts`: the most that a step on a GPU verifies, of requests of up to `max_context` tokens; on a CPU the host
    drafts with a program of its own.
    """
    lower: tuple[Pass, ...] = WIDEN
    if arch != "cpu":
        drafting = (FlattenStreams(), AppendDrafts(max_tokens=drafts, max_context=max_context))
        stored = (*STORE, *(SCALED if arch in _SCALED else ()))
        lower = (*stored, *(drafting if drafts else (AppendSampling(),)))
    return Pipeline((*RAISE, *FUSE, *lower, Quantise(formats=formats), CheckLowered()), machine=arch)


def reference_pipeline(formats: Mapping[str, str]) -> Pipeline:
    """Raised and stitched, nothing fused: what the default pipeline is compared with."""
    return Pipeline((*RAISE, Quantise(formats=formats)))
