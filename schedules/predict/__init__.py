"""How long a call takes: what its kernels ask of the machine, at rates measured on one part of an H200's rows.

    choice (schedule, config) + step -> stages (_matrix, _attention, _rows) -> seconds (_rates)

Selection ranks by schedules/_roofline.py; this predicts. A stage takes

    fixed + rounds x round + (memory^p + cache^p + arithmetic^p)^(1/p)

where memory is bytes over the copy bandwidth times a share, cache is bytes over that of the L2 cache, arithmetic is
operations of whole tiles in whole rounds over the peak of their unit times a share. Shares, `fixed` (launch, first
loads, drain) and `round` are a kernel's constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dsv4c.errors import ScheduleError
from dsv4c.schedules._schedule import Config, OpNode
from dsv4c.schedules.predict import _attention, _matrix, _rows
from dsv4c.schedules.predict._rates import Bound, busy, card_of, measured, seconds
from dsv4c.schedules.predict._stage import Card, Situation, Stage

__all__ = ["Bound", "Card", "Situation", "Stage", "busy", "card_of", "described", "measured", "seconds", "stages"]

Stages = Callable[[OpNode, Mapping[str, int], Config, Situation, Card], tuple[Stage, ...]]

_BY_WAY: dict[str, Stages] = {
    "gluon_few": _matrix.few, "gluon_many": _matrix.many, "tile_ring": _matrix.tile_ring, "aten": _matrix.vendor,
    "tilelang_pairs": _matrix.pairs,
    "triton_scaled": _matrix.scaled, "triton_tiles": _matrix.scaled, "gluon_groups": _attention.groups,
    "triton_wide": _attention.wide, "tile_pair": _attention.pair, "triton_gather": _attention.gather,
    "gluon_pages": _attention.scores, "gluon_keys": _attention.scores, "triton_tokens": _attention.scores,
    "triton_split": _rows.split, "tile_split": _rows.split, "gluon_cluster": _rows.cluster,
    "triton_cluster": _rows.few,
    "triton_overlap": _rows.compress, "triton_window": _rows.compress, "triton_slices": _rows.slices,
    "triton_lists": _rows.sample, "triton_groups": _rows.rows, "triton_heads": _rows.rows, "triton_rows": _rows.rows,
    "gluon_fragments": _matrix.experts,
}  # fmt: skip
_BY_NAME: dict[str, Stages] = {
    "index_query.triton_rows": _attention.query, "topk_rows.gluon_groups": _attention.rows,
    "gate_bias.triton_rows": _matrix.gate, "gate_hash.triton_rows": _matrix.gate, "hc_post.triton_tiles": _rows.rows,
    **{f"gate_linear_{kind}.gluon_few": _matrix.gate_few for kind in ("bias", "hash")},
    **{f"gate_linear_{kind}.triton_tiles": _matrix.gate_scaled for kind in ("bias", "hash")},
    **{
        f"index_topk_packed.{way}": _attention.picks
        for way in ("gluon_pages", "gluon_keys", "triton_tokens", "triton_tiles", "triton_runs")
    },
    **{f"index_scores.{way}": _attention.scores for way in ("triton_tiles", "triton_runs")},
    **{f"{op}.triton_scaled": _matrix.experts_scaled for op in ("experts_fp4", "experts_mx", "experts_nvfp4")},
    **{f"{op}.triton_rows": _rows.gathered for op in ("embed", "embed_streams", "take_rows")},
    **{
        f"{op}.triton_rows": _rows.tiny
        for op in (
            "accept_drafts", "advance_rows", "edit_logits", "entry_slots", "entry_rope_table", "feed_drafts",
            "feed_ends", "feed_spans", "feed_tokens", "keep_draft", "keep_tokens", "place_tokens", "rope_table",
            "row_facts", "token_slots",
        )
    },
}  # fmt: skip


def described(schedule: str) -> bool:
    """Whether the stages of a schedule are known."""
    return schedule in _BY_NAME or schedule.partition(".")[2] in _BY_WAY


def stages(
    schedule: str, node: OpNode, symbols: Mapping[str, int], config: Config, step: Situation, card: Card
) -> tuple[Stage, ...]:
    """What the kernels of a call ask for. Raises ScheduleError for a schedule whose kernels nobody described."""
    make = _BY_NAME.get(schedule) or _BY_WAY.get(schedule.partition(".")[2])
    if make is None:
        raise ScheduleError(
            f"nothing predicts schedule `{schedule}`", hint="add its stages to schedules/predict, as for its family"
        )
    return make(node, symbols, config, step, card)
