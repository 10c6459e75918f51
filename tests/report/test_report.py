"""What a report holds: every pass, every sublayer, every program, the memory of every load; and the page made of it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from dsv4c.ops import OPS
from dsv4c.report import Report
from dsv4c.report.code import code
from dsv4c.report.drawing import BOX_HEIGHT, draw
from dsv4c.report.families import FAMILIES, OPS_OF, family_of
from dsv4c.report.sides import Row

MOST_BYTES = 5_000_000


def test_every_op_has_a_family() -> None:
    named = [name for names in OPS_OF.values() for name in names]
    assert sorted(named) == sorted(OPS) and set(OPS_OF) | {"aten"} == set(FAMILIES)
    assert family_of("hc_pre") == "hyper" and family_of(max) == "aten"


def test_a_stage_for_each_pass_in_order(report: Report) -> None:
    names = [stage.name for stage in report.stages]
    assert names[0] == "canonicalize" and names[-1] == "check-lowered" and len(names) == len(set(names))
    for stage in report.stages:
        assert stage.summary and stage.changed == bool(stage.difference.folds)
        assert stage.changed == (stage.difference.removed + stage.difference.added + stage.difference.changed > 0)
    fuse = report.stages[names.index("fuse-hc-norm")]
    assert "dsv4.hc_pre_norm" in fuse.example and fuse.needs == ("stitched",)


def test_what_happens_in_all_layers_is_folded(report: Report) -> None:
    stage = next(s for s in report.stages if s.name == "fuse-hc-norm")
    held = [(fold.hunk.section, *fold.alike) for fold in stage.difference.folds]
    sections = [section for fold in held for section in fold]
    assert {f"L{n:02d}.{part}" for n in range(5) for part in ("attn", "ffn")} <= set(sections)
    assert len(sections) == len(set(sections)) and len(held) < len(sections)


def test_the_work_does_not_jump_where_pieces_are_joined(report: Report) -> None:
    for step, captured in report.captured_work.items():
        works = [captured, *(stage.work[step] for stage in report.stages)]
        names = ["capture", *(stage.name for stage in report.stages)]
        joined = names.index("stitch")
        assert works[joined].kernels == works[joined - 1].kernels
        assert works[-1].kernels < works[joined].kernels < works[0].kernels
        assert works[-1].bytes_moved < works[joined].bytes_moved
        last = report.last_work[step].values()
        assert sum(work.kernels for work in last) == works[-1].kernels


def test_sublayers_step_through_the_passes(report: Report) -> None:
    frames = report.frames["attention.csa"]
    assert [frame.stage for frame in frames][:2] == ["capture", "canonicalize"]
    assert len(frames) == len({frame.stage for frame in frames})
    first, last = frames[0].sublayer, frames[-1].sublayer
    assert {box.kind for box in first.boxes} >= {"region", "end"} and "region" not in {box.kind for box in last.boxes}
    fused = next(frame for frame in frames if frame.stage == "fuse-head-rope")
    assert sorted(fused.gone) == ["head_norm", "rope", "rope", "split_heads"]
    assert sorted(fused.came) == ["head_norm_rope", "split_heads_rope"]
    boxes = {box.key: box.label for box in fused.sublayer.boxes}
    assert sorted(boxes[key] for key in fused.changed) == ["head_norm_rope", "split_heads_rope"]
    assert set(report.frames) >= {
        "prelude",
        "embed",
        "attention.window",
        "attention.hca",
        "ffn.hash",
        "head",
        "sampling",
    }


def test_boxes_say_where_they_come_from(report: Report) -> None:
    last = report.frames["attention.csa"][-1].sublayer
    facts = {box.label: dict(box.facts) for box in last.boxes if box.kind == "op"}
    assert "attention.py:" in facts["attend_csa_packed"]["from"]
    assert "pack-state" in facts["attend_csa_packed"]["passes"]
    assert any(key.startswith("work: decode") for key in facts["attend_csa_packed"])


def test_every_drawing_is_whole(report: Report) -> None:
    for frames in report.frames.values():
        for frame in frames:
            keys = [box.key for box in frame.sublayer.boxes]
            assert len(keys) == len(set(keys)) and {k for a in frame.sublayer.arrows for k in a} <= set(keys)
            drawing = draw(frame.sublayer, frame.changed)
            for box in drawing.boxes:
                assert box.x >= 0 and box.x + box.width <= drawing.width
                assert box.y >= 0 and box.y + BOX_HEIGHT <= drawing.height


def test_programs_are_cut_and_drawn_whole(report: Report) -> None:
    drawn = [p for p in report.programs if p.rows]
    assert [p.name for p in drawn] == ["decode.16", "prefill.256.32"] or {p.phase for p in drawn} == {
        "decode",
        "prefill",
    }
    for program in report.programs:
        assert sum(s.calls for s in program.segments) == program.calls
        assert program.segments[-1].ends == "the program ends"
    for program in drawn:
        numbers = [cell.number for row in program.rows for cell in row.cells]
        assert numbers == list(range(program.calls))


def test_memory_of_every_load(report: Report) -> None:
    memory = report.memory
    assert (memory.chosen.context, memory.chosen.requests) == (8192, 4)
    assert memory.chosen in [load for row in memory.loads for load in row]
    for row in memory.loads:
        assert [load.pool_bytes for load in row] == sorted(load.pool_bytes for load in row)
        assert len(row[0].pools) == len(memory.pools) == len(memory.notes)
        fits = [load.fits for load in row]
        assert fits == sorted(fits, reverse=True)
    assert len(memory.answers) == len(memory.loads)


class _Page(HTMLParser):
    """Collects ids, links to them, anything that would be fetched, and elements that are never closed."""

    VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        if tag == "a":
            self.links.append(values.get("href") or "")
        self.fetched += [v for k, v in attrs if k in ("src", "srcset", "poster", "action") and v]
        if tag == "link" and not (values.get("href") or "").startswith("data:"):
            self.fetched.append(str(values))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_the_page_is_whole_and_fetches_nothing(html: str) -> None:
    page = _Page()
    page.feed(html)
    assert page.open == [] and page.fetched == []
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(html.encode()) < MOST_BYTES


def test_the_page_names_everything(html: str, report: Report) -> None:
    for stage in report.stages:
        assert f'id="pass-{stage.name}"' in html
    for name in (*report.frames, *(p.name for p in report.programs if p.rows), *report.memory.pools):
        assert name in html
    assert "3.1e-2" in html and "10 prompts" in html
    data = json.loads(re.search(r'id="memory-data">(.*?)</script>', html)[1])  # type: ignore[index]
    i, j = data["chosen"]
    assert data["loads"][i][j]["requests"] == 4


def test_the_page_is_the_same_each_time(html: str, report: Report) -> None:
    from dsv4c.report import render

    assert render(report) == html


def test_text_of_the_program_is_escaped() -> None:
    assert code((("%0 = dsv4.a(", False), ("<b>&", True), (") : f32[T]", False))) == (
        "%0 = <b>dsv4.a</b>(<mark>&lt;b&gt;&amp;</mark>)<i> : f32[T]</i>"
    )


@pytest.mark.parametrize("name", ["fuse-stored-linears", "narrow-activations"])
def test_every_shown_row_has_text(report: Report, name: str) -> None:
    stage = next(s for s in report.stages if s.name == name)
    rows = [row for fold in stage.difference.folds for row in fold.hunk.rows if isinstance(row, Row)]
    assert rows and all((row.before or row.after).text for row in rows)  # type: ignore[union-attr]
