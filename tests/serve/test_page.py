"""The chat page in a real browser: Chromium without a window, driven by Playwright."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from nanochat.inference.scheduler import Token
from nanochat.serve.app import ServerSettings
from nanochat.serve.models import Settings, load_model
from tests.serve.conftest import serve

EVIL = "Hi **there** <script>window.broken = 1</script><img src=x onerror='window.broken = 1'> [x](javascript:broken)"
CODE = "\n```python\nprint('<b>')\n```\nend"


@pytest.fixture(scope="module")
def running(run):
    """Two models; the first one's steps take 8 ms, so that an answer can be seen growing."""
    models = lambda: [load_model(run, Settings("torch", slots=2), name) for name in ("little", "other")]  # noqa: E731
    with serve(models, ServerSettings(grace=1.0)) as running:
        step = running.engine.scheduler.step

        def slower():
            time.sleep(0.008)
            step()

        running.engine.scheduler.step = slower
        yield running


@pytest.fixture
def page(browser, running) -> Iterator[Page]:
    """The page, in a browser that has never seen it; an error in its script fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(running.url)
    expect(page.locator("#model option")).to_have_count(2)
    yield page
    context.close()
    assert not errors


def ask(page: Page, text: str) -> None:
    page.get_by_role("button", name="Chat", exact=True).click()
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Page):
    return page.locator(".message.assistant .body")


def test_an_answer_streams_stops_and_is_there_after_a_reload(page, running):
    ask(page, "one two three")
    answer = answers(page).last
    expect(answer).to_have_text(re.compile(r"\S"))
    first = answer.inner_text()
    page.wait_for_function("n => document.querySelector('.assistant .body').innerText.length > n + 5", arg=len(first))
    page.keyboard.press("Escape")
    running.idle(3)
    expect(page.locator(".speed")).to_contain_text("stopped")
    text = answer.inner_text()
    page.reload()
    expect(answers(page)).to_have_text(text)
    expect(page.locator(".message.user .body")).to_have_text("one two three")
    expect(page.locator("#list li")).to_have_count(1)


def test_regenerate_edit_and_several_conversations(page):
    page.locator("#settings").click()
    page.get_by_label("Longest answer").fill("6")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("System prompt").fill("one two")
    page.get_by_role("button", name="Done").click()
    ask(page, "one two three")
    expect(page.locator(".speed")).to_contain_text("tokens/s")
    before = answers(page).inner_text()
    page.get_by_role("button", name="Write another answer").click()
    expect(page.locator(".speed")).to_contain_text("tokens/s")
    expect(answers(page)).to_have_text(before)  # the seed is fixed
    page.locator(".message.user").hover()
    page.get_by_role("button", name="Edit and send again").click()
    page.get_by_label("Edit the message").fill("die Straße")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user .body")).to_have_text("die Straße")
    expect(page.locator(".speed")).to_contain_text("tokens/s")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".message")).to_have_count(0)
    ask(page, "second")
    expect(page.locator(".speed")).to_contain_text("tokens")
    expect(page.locator("#list .name")).to_have_text(["second", "die Straße"])
    page.get_by_role("button", name="die Straße", exact=True).click()
    expect(page.locator(".message.user .body")).to_have_text("die Straße")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export this conversation").click()
    exported = download.value.path().read_text(encoding="utf-8")
    assert exported.startswith("**user**\n\ndie Straße\n")
    assert "**assistant**" in exported
    page.get_by_role("button", name="Delete die Straße").click()
    expect(page.locator("#list .name").first).not_to_have_text("die Straße")


def test_html_in_an_answer_is_text(page, running):
    """The model's thread is made to write what a hostile model would."""
    engine = running.engine
    codec, submit = engine.model.codec, engine.submit

    def write(requests):
        for request in requests:
            for token in codec.encode(EVIL + CODE):
                request.on_token(Token(token))
            request.on_end("stop", None)

    engine.submit = write
    try:
        ask(page, "<b>me</b>")
        expect(answers(page)).to_contain_text("end")
    finally:
        engine.submit = submit
    expect(page.locator(".message.user .body")).to_have_text("<b>me</b>")
    assert "<script>window.broken = 1</script>" in answers(page).inner_text()
    assert page.evaluate("window.broken") is None
    assert page.locator(".body script, .body img, .body b").count() == 0
    assert page.locator(".body a").count() == 0
    expect(answers(page).locator("strong")).to_have_text("there")
    expect(answers(page).locator(".block code")).to_have_text("print('<b>')")
    assert (
        page.evaluate("fetch('https://example.org').then(() => 'sent', () => 'refused')") == "refused"
    )  # the page's policy lets it talk to its own server alone


def test_completion_mode_is_where_a_base_model_begins(page):
    expect(page.locator("#note")).to_contain_text("base model")
    area = page.get_by_label("Text to continue")
    area.fill("the quick")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#state")).to_contain_text("tokens/s", timeout=15_000)
    text = area.input_value()
    assert text.startswith("the quick")
    assert len(text) > 30
    page.reload()
    expect(area).to_have_value(text)
    page.select_option("#model", "other")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#undo")).to_be_enabled(timeout=15_000)
    page.locator("#undo").click()
    expect(area).to_have_value(text)


def test_a_phone_and_the_dark(browser, running):
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme="dark")
    page = context.new_page()
    page.goto(running.url)
    expect(page.locator("#model option")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    expect(page.locator("#side")).not_to_be_visible()
    page.get_by_role("button", name="Conversations").click()
    expect(page.locator("#side")).to_be_visible()
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.locator("#theme").click()
    assert page.evaluate(background) != dark
    page.reload()
    assert page.evaluate(background) != dark
    context.close()


def test_an_error_is_shown(page, running):
    engine = running.engine
    prefill = engine.model.backend.prefill
    engine.model.backend.prefill = lambda *_: (_ for _ in ()).throw(RuntimeError("no memory left"))
    try:
        ask(page, "one")
        expect(page.locator(".error").first).to_have_text("no memory left")
    finally:
        engine.model.backend.prefill = prefill
    page.get_by_role("button", name="Write another answer").click()
    expect(answers(page)).to_have_text(re.compile(r"\S"))
    page.keyboard.press("Escape")
