"""The playground in a headless browser: it streams, keeps reasoning apart, shows the queue, and asks nobody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import httpx
import pytest

from dsv4c.runtime.operations import Operations
from tests.runtime.live import MODEL, Live, Paced, start_toy, wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Open = Callable[..., "Page"]
KEY = "a-key-of-the-test"


@pytest.fixture
def paced() -> Iterator[tuple[Live, Paced]]:
    live, executor = start_toy(max_requests=2, eos=())
    yield live, executor
    executor.gate.set()
    live.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens the page of a server; afterwards nothing was raised, and nothing was asked of anybody else."""
    said: list[str] = []
    origins: set[str] = set()
    contexts, asked = [], set()

    def open_(live: Live, width: int = 1280, scheme: Literal["light", "dark"] = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: said.append(m.text) if "401" not in m.text and "400" not in m.text else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: origins.add("/".join(request.url.split("/")[:3])))
        asked.add(live.url)
        page.goto(f"{live.url}/")
        page.locator("#state.ready").wait_for()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == [] and origins <= asked


def ask(page: Page, text: str) -> None:
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def ended(page: Page) -> None:
    page.locator(".running").wait_for(state="detached")


def test_an_answer_streams_and_the_queue_is_shown(paced: tuple[Live, Paced], open_page: Open) -> None:
    live, executor = paced
    page = open_page(live)
    assert page.locator("#model").inner_text() == MODEL
    page.locator("#max_tokens").fill("40")
    page.locator("#temperature").fill("0")
    executor.step_s = 0.02
    ask(page, "abc")
    said = page.locator(".model .said")
    page.locator(".running .facts", has_text="tokens/s").wait_for()
    executor.gate.clear()
    part = said.inner_text()
    page.locator("#running", has_text="1").wait_for()
    executor.gate.set()
    ended(page)
    assert len(said.inner_text()) > len(part) and page.locator(".user .said").inner_text() == "abc"
    facts = page.locator(".model .facts").inner_text()
    assert "first after" in facts and "tokens/s" in facts and page.locator("#send").is_enabled()


def test_reasoning_stands_apart(paced: tuple[Live, Paced], open_page: Open) -> None:
    live, _ = paced
    page = open_page(live)
    assert not page.locator("#effort").is_visible()
    page.locator("#thinking").check()
    page.locator("#effort").select_option("high")
    page.locator("#max_tokens").fill("30")
    page.locator("#temperature").fill("0")  # a drawn answer may be without a thought
    ask(page, "think")
    ended(page)
    thought = page.locator(".thought div")
    assert thought.inner_text() and page.locator(".thought summary").inner_text() == "Reasoning"
    page.locator(".thought summary").click()
    assert not thought.is_visible()


def test_escape_stops_and_frees_the_pages(paced: tuple[Live, Paced], open_page: Open) -> None:
    live, executor = paced
    executor.step_s = 0.01
    page = open_page(live)
    page.locator("#max_tokens").fill("800")
    page.locator("#endpoint").select_option("text")
    assert not page.locator("#thinking").is_visible()
    ask(page, "the raw text")
    page.locator(".running .facts", has_text="tokens/s").wait_for()
    page.keyboard.press("Escape")
    ended(page)
    assert "ended: stopped" in page.locator(".model .facts").inner_text()
    wait_for(lambda: not live.engine.stats().running and not live.pages_used())


def test_an_error_is_shown_in_words(paced: tuple[Live, Paced], open_page: Open) -> None:
    page = open_page(paced[0])
    page.locator("#max_tokens").fill("5000")
    ask(page, "abc")
    ended(page)
    assert "exceed the context" in page.locator("[role=alert]").inner_text()
    page.locator("#clear").click()
    assert page.locator(".turn").count() == 0 and page.locator("#empty").is_visible()


def test_markup_in_an_answer_is_text(paced: tuple[Live, Paced], open_page: Open) -> None:
    page = open_page(paced[0])
    ask(page, "<img src=x onerror=alert(1)>")
    ended(page)
    assert page.locator(".user .said").inner_text().startswith("<img") and page.locator(".turn img").count() == 0


def test_a_key_is_asked_for(open_page: Open) -> None:
    live, _ = start_toy(operations=Operations(api_keys=(KEY,)))
    try:
        page = open_page(live)
        page.locator("#access").wait_for()
        page.locator("#key").fill(KEY)
        page.locator("#key").press("Enter")
        page.locator("#model", has_text=MODEL).wait_for()
        page.locator("#max_tokens").fill("4")
        ask(page, "abc")
        ended(page)
        assert page.locator(".error").count() == 0
    finally:
        live.close()


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(
    toy_server: Live, open_page: Open, width: int, scheme: Literal["light", "dark"]
) -> None:  # fmt: skip
    page = open_page(toy_server, width, scheme)
    ask(page, "a" * 300)
    ended(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_on_a_phone_the_end_and_the_message_stay_in_view(toy_server: Live, open_page: Open) -> None:
    page = open_page(toy_server, 390)
    for _ in range(3):
        ask(page, "a long line of words " * 30)
        ended(page)
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    box = page.locator("#send").bounding_box()
    assert box is not None and box["y"] + box["height"] <= 844
    assert page.evaluate("(t => t.scrollHeight - t.scrollTop - t.clientHeight)(document.getElementById('turns'))") < 40
    assert not page.locator("#temperature").is_visible()
    page.locator("#settings").click()
    page.locator("#temperature").wait_for()
    page.locator("#settings").click()
    assert not page.locator("#temperature").is_visible()


def test_the_page_can_be_left_out() -> None:
    live, _ = start_toy(operations=Operations(page=False))
    try:
        assert httpx.get(f"{live.url}/").status_code == 404
    finally:
        live.close()
