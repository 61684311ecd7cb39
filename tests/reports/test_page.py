"""The report's page in a real browser, and the pictures on it as numbers."""

from __future__ import annotations

import itertools
import math
import random
import re

import pytest
from playwright.sync_api import expect

from nanochat.reports.page import Dot, Interval, Series, document, intervals, legend, lines, scatter
from nanochat.reports.page.chart import log_ticks, pareto, ticks
from nanochat.studies.evidence import groups_of, read_runs
from nanochat.studies.report import Report
from tests.reports.folders import write_run, write_sweep


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.93, 0.97), (-3, 8), (0, 16384), (1e-9, 3e-9), (5, 5.001)])
def test_ticks_are_round_few_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    steps = {round((b - a) / (high - low), 6) for a, b in itertools.pairwise(found)}
    assert len(steps) == 1
    if low > 0:
        found = log_ticks(low, high)
        assert 1 <= len(found) <= 7
        assert all(low <= value <= high for value in found)


def test_logarithmic_ticks_of_many_decades():
    assert log_ticks(1, 1000) == [1, 10, 100, 1000]
    assert log_ticks(0.5, 12) == [0.5, 1, 2, 5, 10]
    assert 2 <= len(log_ticks(1e-9, 1e9)) <= 6


def test_the_front_against_brute_force():
    draw = random.Random(1)
    for _ in range(50):
        dots = [Dot("", 0, draw.randint(0, 6), draw.randint(0, 6)) for _ in range(8)]
        beaten = lambda d: any(  # noqa: E731
            o.x <= d.x and o.y <= d.y and (o.x, o.y) != (d.x, d.y)
            for o in dots  # noqa: B023
        )
        assert {(d.x, d.y) for d in pareto(dots)} == {(d.x, d.y) for d in dots if not beaten(d)}


def test_points_lie_where_their_numbers_are():
    svg = lines("t", "x", "y", [Series("a", 0, [(0, 1.0), (10, 3.0), (20, 2.0)])])
    places = [tuple(map(float, p.split())) for p in re.search(r'd="M([^"]*)"/>', svg)[1].split("L")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(2 * (y2 - y1), abs=0.2)
    assert y1 < y2 < y0  # upwards is more


def test_single_points_and_nothing():
    assert lines("t", "x", "y", []) == scatter("t", "x", "y", []) == intervals("t", "x", []) == ""
    for svg in (
        lines("t", "x", "y", [Series("a", 0, [(5, 5)])]),
        lines("t", "x", "y", [Series("a", 0, [(0, 0)])]),
        scatter("t", "x", "y", [Dot("a", 0, 1.0, 1.0)]),
        intervals("t", "x", [Interval("a", 0, 0.0, math.inf)]),
    ):
        assert "nan" not in svg.lower().replace("nanochat", "")
        assert "inf" not in svg


@pytest.fixture
def written(tmp_path):
    sweep = write_sweep(tmp_path / "sweep")
    for seed in range(3):
        evil = "<img src=x onerror=window.broken=1>"
        write_run(sweep / str(6 + seed), 1.0 + seed, seed, [f"optim={evil}"], optim=evil)
    groups = groups_of(read_runs([sweep]))
    (tmp_path / "page.html").write_text(Report(groups, "Does <b>it</b> pay?").html(), encoding="utf-8")
    return tmp_path / "page.html"


@pytest.fixture
def page(browser, written):
    """The page; a request beside its own, a message in the console or an error fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    said: list[str] = []
    page.on("request", lambda request: said.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(written.as_uri())
    yield page
    context.close()
    assert said == [written.as_uri()]


def test_values_logarithms_and_hidden_arms(page):
    figure = page.locator("figure.chart[data-x]").first
    expect(page.locator("h1")).to_have_text("Does <b>it</b> pay?")
    expect(page.locator("figure.chart")).to_have_count(7)
    svg, line = figure.locator("svg"), figure.locator("path.line").first
    svg.hover(position={"x": 250, "y": 150})
    tip = page.locator("#tip")
    expect(tip).to_contain_text("tokens")
    expect(tip.locator("div")).to_have_count(4)
    expect(tip).to_contain_text("onerror")  # a name as text
    page.get_by_label("optim=muon").uncheck()
    assert page.locator('path.line[data-arm="1"]:visible, [data-arm="1"] path.line:visible').count() == 0
    svg.hover(position={"x": 200, "y": 150})
    expect(tip.locator("div")).to_have_count(3)
    before = line.get_attribute("d")
    figure.get_by_role("button", name="log y").click()
    after = line.get_attribute("d")
    assert after != before
    expect(figure.locator(".tick.y.log")).to_be_visible()
    expect(figure.locator(".tick.y.linear")).not_to_be_visible()
    figure.get_by_role("button", name="log y").click()
    assert line.get_attribute("d") == before  # the script draws what was drawn without it
    assert page.evaluate("window.broken") is None


def test_a_phone_the_dark_paper_and_no_script(browser, written):
    background = "getComputedStyle(document.body).backgroundColor"
    phone = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme="dark").new_page()
    phone.goto(written.as_uri())
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    assert phone.evaluate(background) == "rgb(20, 23, 26)"
    phone.emulate_media(media="print")
    assert phone.evaluate(background) == "rgb(255, 255, 255)"
    expect(phone.locator("figcaption button").first).not_to_be_visible()
    phone.context.close()
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(written.as_uri())
    expect(plain.locator("figure path.line").first).to_be_visible()
    plain.get_by_label("optim=muon").uncheck()
    expect(plain.locator('figure [data-arm="1"]').first).not_to_be_visible()
    plain.context.close()


def test_the_page_forbids_what_it_does_not_need(browser, tmp_path):
    """A script that got in by some mistake does not run, and nothing is loaded."""
    place = tmp_path / "page.html"
    evil = "<script>window.broken = 1</script><img src='https://example.org/x.png' onerror='window.broken = 1'>"
    place.write_text(document("t", [evil, legend(["a"])], []), encoding="utf-8")
    page = browser.new_page()
    sent: list[str] = []
    page.on("response", lambda response: sent.append(response.url))
    page.goto(place.as_uri())
    assert page.evaluate("window.broken") is None
    assert sent == [place.as_uri()]
    page.close()
