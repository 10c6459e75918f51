"""The report in a headless browser: quiet, offline, usable by keyboard, and within a phone's width."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from dsv4c.report import Report, render
from dsv4c.report.segmented import SegmentRow

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Open = Callable[..., "Page"]


@pytest.fixture
def open_page(browser: Browser, page_file: Path) -> Iterator[Open]:
    """Opens the report; afterwards nothing was printed to the console, nothing raised and nothing requested."""
    said: list[str] = []
    requested: list[str] = []
    contexts, files = [], set()

    def open_(
        width: int = 1280, scheme: Literal["light", "dark"] = "light", anchor: str = "", file: Path = page_file
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requested.append(request.url.split("#")[0]))
        files.add(file.as_uri())
        page.goto(file.as_uri() + anchor)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == [] and set(requested) == files


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(open_page: Open, width: int, scheme: Literal["light", "dark"]) -> None:
    page = open_page(width, scheme)
    page.get_by_role("button", name="Open all").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_first_stop_of_the_tab_key_skips_the_contents(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the report"
    page.keyboard.press("Enter")
    assert focused(page) == "main"


def test_the_contents_lead_to_a_pass_and_open_it(open_page: Open) -> None:
    page = open_page()
    link = page.locator('.toc a[href="#passes"]')
    link.focus()
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    assert "raise-attention" in focused(page)
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('pass-raise-attention').open")
    assert page.evaluate("document.activeElement.closest('details').id") == "pass-raise-attention"
    assert page.locator("#pass-raise-attention .hunk").first.is_visible()
    page.keyboard.press("Enter")
    assert not page.evaluate("document.getElementById('pass-raise-attention').open")


def test_a_link_from_outside_opens_its_pass(open_page: Open) -> None:
    page = open_page(anchor="#pass-fuse-hc-norm")
    assert page.locator("#pass-fuse-hc-norm .hunk").first.is_visible()


def test_arrow_keys_step_through_the_graph(open_page: Open) -> None:
    page = open_page()
    shown = page.locator("#canvas svg:not([hidden])")
    assert shown.count() == 1 and shown.get_attribute("data-stage") == "capture"
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowRight")
    assert shown.count() == 1 and shown.get_attribute("data-stage") == "canonicalize"
    page.keyboard.press("End")
    last = shown.get_attribute("data-stage")
    assert page.locator("#next").is_disabled() and page.locator('#frames [aria-pressed="true"]').inner_text() == last
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    name = page.locator("#canvas .sel text").first.text_content()
    assert page.locator("#box h4").inner_text() == name
    page.locator("#sublayer").select_option("ffn.hash")
    assert shown.get_attribute("data-of") == "ffn.hash"


def test_a_pass_links_to_its_drawing(open_page: Open) -> None:
    page = open_page(anchor="#pass-fuse-head-rope")
    page.locator('#pass-fuse-head-rope [data-show="attention.hca"]').click()
    shown = page.locator("#canvas svg:not([hidden])")
    assert (shown.get_attribute("data-of"), shown.get_attribute("data-stage")) == ("attention.hca", "fuse-head-rope")


def test_tabs_and_maps_by_keyboard(open_page: Open) -> None:
    page = open_page()
    tabs = page.locator("#programs [role=tab]")
    tabs.first.focus()
    page.keyboard.press("ArrowRight")
    assert tabs.nth(1).get_attribute("aria-selected") == "true"
    panel = page.locator(f"#{tabs.nth(1).get_attribute('aria-controls')}")
    assert panel.is_visible() and not page.locator(f"#{tabs.first.get_attribute('aria-controls')}").is_visible()
    panel.locator(".map").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    chosen = panel.locator("i.sel")
    assert chosen.count() == 1 and panel.locator(".map").get_attribute("aria-activedescendant") == chosen.get_attribute(
        "id"
    )
    assert panel.locator(".readout h4").inner_text() == chosen.get_attribute("data-k")


def test_a_break_stands_in_the_map_with_its_reason(open_page: Open, report: Report, tmp_path: Path) -> None:
    """Of a program whose second half is not captured."""
    program = next(p for p in report.programs if p.rows)
    at = program.calls // 2
    why = "`topk.own` cannot be captured"
    rows = tuple(
        dataclasses.replace(
            row, cells=tuple(dataclasses.replace(c, breaks=why if c.number == at else "") for c in row.cells)
        )
        for row in program.rows
    )
    segments = (
        SegmentRow("graph", at, at, "prelude", "L02.attn", "", f"call {at} is eager: {why}"),
        SegmentRow("eager", program.calls - at, program.calls - at, "L02.attn", "head", why, "the program ends"),
    )
    file = tmp_path / "broken.html"
    broken = dataclasses.replace(program, segments=segments, rows=rows)
    file.write_text(render(dataclasses.replace(report, programs=(broken,))), encoding="utf-8")
    page = open_page(file=file)
    panel = page.locator("#programs")
    assert [row.inner_text().split("\t")[1] for row in panel.locator(".breaks tbody tr").all()] == ["graph", "eager"]
    assert why in panel.locator(".breaks tbody tr").nth(1).inner_text()
    assert panel.locator(".legend").first.locator("li").all_inner_texts() == ["graph: captured", "eager"]
    assert panel.locator("i.brk").count() == 1
    panel.locator("i.brk").click()
    assert why in panel.locator(".readout").inner_text()


def test_what_is_wider_than_a_phone_scrolls_by_keyboard(open_page: Open) -> None:
    phone, wide = open_page(390), open_page(1280)
    box = phone.locator("#programs > .scroll")
    phone.wait_for_function("document.querySelector('#programs > .scroll').tabIndex === 0")
    box.focus()
    phone.keyboard.press("ArrowRight")
    phone.wait_for_function("document.querySelector('#programs > .scroll').scrollLeft > 0")
    assert wide.locator("#programs > .scroll").get_attribute("tabindex") is None


def test_the_contents_mark_where_the_reader_is(open_page: Open) -> None:
    page = open_page()
    for name in ("passes", "graph", "memory"):
        page.evaluate("name => document.getElementById(name).scrollIntoView()", name)
        page.wait_for_function("name => document.querySelector('.toc .here')?.hash === '#' + name", arg=name)


def test_the_numerics_table_shows_what_was_measured(open_page: Open) -> None:
    page = open_page()
    table = page.locator("#numerics table").first
    cells = {}
    for row in table.locator("tbody tr").all():
        name, *rest = row.inner_text().split("\t")
        cells[name] = rest
    names = list(cells)
    assert names[0] == "capture" and names[-1] == "compiled program" and cells["compiled program"][1] == "2.0e-6"
    assert cells["pack-state"][:3] == ["within 0.25", "3.1e-2", "yes"]
    assert cells["store-linears"][1:3] == ["0.71", "no: 0.71 is beyond 0.25"]
    assert cells["quantise"][2] == "not verified"
    assert page.locator("#numerics .verdict.broken").inner_text().startswith("broken: pass `store-linears`")
    kernels = page.locator("#numerics table").nth(1)
    assert "1.1e-3" in kernels.inner_text() and "not run" in kernels.inner_text()


def test_another_load_changes_the_memory_picture(open_page: Open) -> None:
    page = open_page()
    said = page.locator("#load")
    assert said.inner_text().startswith("4 requests of 8,192 tokens")
    page.locator(".load[aria-pressed=true]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert said.inner_text().startswith("16 requests of 8,192 tokens")
    total = page.locator("#mem-table .sum .num").inner_text()
    assert total in said.inner_text()
    shares = page.eval_on_selector_all("#mem-all rect", "all => all.map(r => parseFloat(r.getAttribute('width')))")
    assert 0 < sum(shares) <= 100.01


def test_colours_follow_the_system_until_told(open_page: Open) -> None:
    def background(page: Page) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = open_page(scheme="light"), open_page(scheme="dark")
    white, black = background(light), background(dark)
    assert white != black
    dark.locator("#theme").click()
    assert background(dark) == white
    light.locator("#theme").click()
    light.locator("#theme").click()
    assert background(light) == black


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(open_page: Open, scheme: Literal["light", "dark"]) -> None:
    """Contrast of ink and soft text with page, panel and diff colours: 4.5 as WCAG's AA asks of text."""
    page = open_page(scheme=scheme)
    names = ("ink", "soft", "accent", "bg", "panel", "del", "add")
    colours = page.evaluate(
        """names => { const style = getComputedStyle(document.documentElement), probe = document.createElement('i');
        document.body.append(probe);
        return Object.fromEntries(names.map(name => { probe.style.color = style.getPropertyValue('--' + name);
            return [name, getComputedStyle(probe).color.match(/[0-9]+/g).map(Number)]; })); }""",
        list(names),
    )

    def luminance(colour: list[int]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for text in ("ink", "soft"):
        for ground in ("bg", "panel", "del", "add"):
            low, high = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_on_a_phone_the_sides_stand_under_each_other(open_page: Open) -> None:
    page = open_page(390, anchor="#pass-fuse-hc-norm")
    assert not page.locator(".toc").is_visible()
    block = page.locator("#pass-fuse-hc-norm .r.m").first
    removed, added = block.locator(".d").last.bounding_box(), block.locator(".a").first.bounding_box()
    assert removed and added and removed["y"] + removed["height"] <= added["y"] and removed["x"] == added["x"]
    page.locator(".contents summary").click()
    page.locator('.toc a[href="#memory"]').click()
    assert not page.locator(".toc").is_visible()


def test_without_scripts_everything_can_be_read(browser: Browser, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator("#canvas svg:not([hidden])").is_visible()
    assert all(panel.is_visible() for panel in page.locator("[role=tabpanel]").all())
    context.close()
