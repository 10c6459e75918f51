"""What drafting with DSpark adds to the dialect; the plain model's functions are the references (dsv4c.model.dspark).

Legend: T tokens, R requests, B block, V vocab_size, M rank of the Markov head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv4c.model import dspark
from dsv4c.ops._op import Index, Op, TensorType

Types = Sequence[TensorType]


def _attention_flops(types: Types, attrs: Mapping[str, Any], symbols: Mapping[str, int]) -> int:
    """4 C operations a head, row and key: q . k and weight x k, multiply-adds counted twice."""
    return 4 * types[0].numel(symbols) * (int(attrs["window"]) + int(attrs["block"]))


def _markov_flops(types: Types, attrs: Mapping[str, Any], symbols: Mapping[str, int]) -> int:
    """One product with w2 for every draft."""
    block_rows, w2 = types[3], types[5]
    return 2 * block_rows.numel(symbols) * int(attrs["block"]) * w2.numel(symbols)


OPS = (
    Op("mean_streams", dspark.mean_streams),
    Op("extend_tap", dspark.extend_tap),
    Op(
        "attend_block",
        dspark.attend_block,
        flops=_attention_flops,
        indices={"request_rows": Index("pages_RP"), "block_rows": Index("q_THC")},
    ),
    Op(
        "markov_draft",
        dspark.markov_draft,
        outputs=2,
        flops=_markov_flops,
        indices={0: Index("w1_VM"), "token_ids": Index("w1_VM"), "block_rows": Index("logits_TV")},
    ),
)
