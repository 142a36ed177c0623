"""The page in headless Chromium: it opens, folds, searches, shows code and plays, and asks for nothing."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dnifx
from dnifx.report.html import to_html
from tests.contracts.hostile import Names, hostile
from tests.report.report_programs import program_of
from tests.report.test_report_gradients import blocks, recurrent
from tests.report.test_report_html import Long

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield opened
        opened.close()


class Tab:
    """A page that is open, with all that it asked for and all errors."""

    def __init__(self, browser: Any, path: Path, text: str) -> None:
        path.write_text(text, encoding="ascii")
        self.page = browser.new_page(viewport={"width": 1300, "height": 850})
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#view .item")
        assert self.asked == [path.as_uri()]

    def boxes(self) -> list[dict[str, float]]:
        """Return where all closed boxes stand, in the graph's own lengths."""
        return self.page.evaluate("[...drawing.places].filter(([id]) => !ITEMS[id].open).map(([, at]) => at)")


def apart(boxes: list[dict[str, float]]) -> bool:
    """Whether no box lies on another."""
    ordered = sorted(boxes, key=lambda box: box["y"])
    return all(
        one["y"] + one["h"] <= two["y"] or one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        for place, one in enumerate(ordered)
        for two in ordered[place + 1 :]
    )


@pytest.mark.parametrize("name", ["blocks", "lstm"])
def test_a_page_unfolds_and_folds(name: str, browser: Any, tmp_path: Path) -> None:
    net = blocks(12, "h.3", "h.7") if name == "blocks" else recurrent(name)
    tab = Tab(browser, tmp_path / "net.html", net.to_html())
    counts = []
    for key in ("f", "u", "u", "u"):
        tab.page.keyboard.press(key)
        counts.append(tab.page.locator("#view .item").count())
        assert apart(tab.boxes())
    assert counts[0] < counts[1] <= counts[2] <= counts[3]
    tab.page.keyboard.press("0")
    for box in tab.page.locator("#view .item").all():
        place, canvas = box.bounding_box(), tab.page.locator("#canvas").bounding_box()
        assert canvas["x"] - 1 <= place["x"]
        assert place["x"] + place["width"] <= canvas["x"] + canvas["width"] + 1
    assert not tab.errors


def test_text_stays_in_its_box(browser: Any, tmp_path: Path) -> None:
    tab = Tab(browser, tmp_path / "net.html", blocks(12, "h.3", "h.7").to_html())
    beyond = """[...view.querySelectorAll('.item')].filter((item) => item.querySelector('.box, .gate')).filter((item) => {
        const box = item.querySelector('.box:not(.behind), .gate').getBBox();
        return [...item.querySelectorAll('text')].some((text) => { const own = text.getBBox();
            return own.x < box.x || own.x + own.width > box.x + box.width; });
    }).length"""
    assert tab.page.evaluate(beyond) == 0


def test_a_search_by_keyboard_shows_shapes_cost_and_code(browser: Any, tmp_path: Path) -> None:
    tab = Tab(browser, tmp_path / "net.html", blocks(12, "h.3", "h.7").to_html())
    tab.page.keyboard.press("f")
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("h.9.0 linear")
    assert tab.page.locator("#results [role=option]").count() == 1
    tab.page.keyboard.press("Enter")
    panel = tab.page.locator("#panel")
    assert "f32[3, 5, 4]" in panel.inner_text()
    assert "h.9.0" in panel.locator("mark").inner_text() or "'9'" in panel.locator("mark").inner_text()
    chosen = tab.page.locator("#view .item.chosen")
    assert chosen.count() == 1
    chosen.focus()
    tab.page.keyboard.press("Enter")
    assert not tab.errors


def test_a_play_marks_what_works(browser: Any, tmp_path: Path) -> None:
    net = blocks(12, "h.3", "h.7")
    tab = Tab(browser, tmp_path / "net.html", net.to_html())
    seen = []
    for _ in str(net.program.schedule).split():
        seen.append(tab.page.locator("#now").inner_text().split()[0])
        tab.page.keyboard.press("]")
        assert tab.page.locator("#view .working").count() >= 1
    assert seen == str(net.program.schedule).split()
    tab.page.select_option("#plays", index=1)
    tab.page.locator("#scaled").check()
    tab.page.locator("#run").click()
    for _ in range(300):  # the page's own rules forbid the script by which playwright would wait
        if tab.page.evaluate("document.getElementById('when').value > 5"):
            break
        tab.page.wait_for_timeout(100)
    assert tab.page.evaluate("document.getElementById('when').value > 5")
    assert tab.page.locator("#run").inner_text() == "Pause"
    tab.page.locator(".act").last.click()
    assert tab.page.locator("#panel mark").count() == 1
    assert not tab.errors


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_light_or_dark(scheme: str, browser: Any, tmp_path: Path) -> None:
    tab = Tab(browser, tmp_path / "net.html", recurrent("gru").to_html())
    tab.page.emulate_media(color_scheme=scheme)
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = "rgb(20, 24, 29)"
    assert (tab.page.evaluate(colour) == dark) == (scheme == "dark")
    tab.page.locator("#theme").click()
    assert (tab.page.evaluate(colour) == dark) == (scheme == "light")


def test_a_large_graph_opens_and_answers(browser: Any, tmp_path: Path) -> None:
    text = to_html(program_of(Long(2500), (torch.zeros(2, 4),), {"middle": "add_900"}))
    tab = Tab(browser, tmp_path / "net.html", text)
    assert tab.page.evaluate("ITEMS.filter((item) => item.k === 'operation').length") >= 5000
    assert tab.page.locator("#view .item").count() < 50
    tab.page.locator("#search").fill("tanh_1777")
    tab.page.keyboard.press("Enter")
    assert "tanh_1777" in tab.page.locator("#panel").inner_text()
    assert tab.page.locator("#view .item.chosen").count() == 1
    assert not tab.errors


def test_names_stay_text(browser: Any, tmp_path: Path) -> None:
    run = "document['body']['dataset']['ran']=1"
    name = f"</script><script>{run}</script><img src=x onerror={run}>"
    names = Names((name, name + "2", name + "3"), name + "4", name + "5", name, ("x", name), ("y", name), name, name)
    model, batch = hostile(names)
    net = dnifx.decouple(model, [name], args=(batch,), loss=lambda output, target: output["y"].sum())
    tab = Tab(browser, tmp_path / "net.html", net.to_html())
    for item in range(tab.page.evaluate("ITEMS.length")):
        tab.page.evaluate(f"go(ITEMS[{item}])")
    tab.page.locator("#search").fill("script")
    assert tab.page.evaluate("document.scripts.length") == 2
    assert tab.page.evaluate("document.images.length") == 0
    assert tab.page.evaluate("document.body.dataset.ran") is None
    assert not tab.errors


def test_a_wide_script_is_measured_wide(browser: Any, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("\u65e5\u672c\u8a9e" * 5, nn.Linear(4, 4))
    net = dnifx.decouple(nn.Sequential(model, nn.Linear(4, 4)), "0", args=torch.randn(2, 4))
    tab = Tab(browser, tmp_path / "net.html", net.to_html())
    assert apart(tab.boxes())
    assert not tab.errors
