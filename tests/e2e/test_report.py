"""Reports of real runs, opened and used in a browser at the widths of a phone and of a desk, light and dark."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import browser, needs_browser
from tests.support import (
    ROOT,
    kill,
    rank_processes,
    read_metrics,
    shardline,
    start_shardline,
    tiny_values,
    trained,
    wait_until,
    write_config,
)

_DESK, _PHONE = (1440, 900), (390, 844)
_HOSTILE = '</script></pre><img src=x onerror="window.broken=1"><!--<script>'
# Smallest contrast by WCAG 2.2: of text, and of curves against what they are drawn on.
_TEXT_CONTRAST, _CURVE_CONTRAST = 4.5, 3.0
_TAP_TARGET_PX = 44

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, shared_corpus: tuple[Path, Path]) -> Path:
    """A run of two attempts: 4 steps under zero2, then 2 more under ddp, whose own report could not be written."""
    corpus, cache = shared_corpus
    root = tmp_path_factory.mktemp("report")
    values = tiny_values(root / "runs", cache, corpus) | {"steps": 4, "evaluation": {"every_steps": 2}}
    config = write_config(root / "tiny.yaml", values)
    trained(shardline("run", config, "--nproc-per-node", 2))
    report = root / "runs" / "tiny" / "report.html"
    (root / "first.html").write_text(report.read_text())
    report.unlink()
    report.mkdir()
    finished = shardline("run", config, "steps=6", "parallel.strategy=ddp", "--nproc-per-node", 2)
    trained(finished)
    (root / "second.log").write_text(finished.stdout + finished.stderr)
    report.rmdir()
    return root / "runs" / "tiny"


@pytest.fixture(scope="module")
def quickstart_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed result of the quickstart, as a run folder."""
    folder = tmp_path_factory.mktemp("committed") / "quickstart"
    folder.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "provenance.json"):
        shutil.copy(ROOT / "benchmarks" / "results" / "2026-11-24_2xcpu" / f"quickstart.{name}", folder / name)
    (folder / "sample.txt").write_text(_HOSTILE)
    return folder


def test_each_run_ends_with_a_report_and_one_that_fails_changes_nothing(run_dir: Path) -> None:
    first = (run_dir.parent.parent / "first.html").read_text()
    assert "all steps done" in first
    assert "zero2 on 2 x CPU" in first
    assert "Held-out document: " in first
    second = (run_dir.parent.parent / "second.log").read_text()
    assert second.count(f"warning: {run_dir / 'report.html'} was not written: ") >= 1
    assert json.loads((run_dir / "outcome.json").read_text())["status"] == "finished"
    # No report, and no less to tell of.
    goodput = json.loads((run_dir / "goodput.json").read_text())
    assert [attempt["last_step"] for attempt in goodput["attempts"]] == [4, 6]
    assert re.search(r"(?m)^goodput \d+\.\d%: training \d+ s of \d+ s \(start-up ", second)


def test_a_run_whose_first_rank_is_killed_has_a_report(make_config: Callable[..., Path], tmp_path: Path) -> None:
    config = make_config("killed", steps=400, schedule={"total_steps": 400})
    run = config.parent / "runs" / "killed"
    launcher = start_shardline("run", config, "--nproc-per-node", 2, log=tmp_path / "log")
    wait_until(lambda: len(read_metrics(run)) >= 3, what="three steps")
    kill(rank_processes(run)[0])
    assert launcher.wait(90) == 1
    page = (run / "report.html").read_text()
    assert '<span class="status failed">' in page
    assert "the process was killed by SIGKILL" in page
    assert '<section class="group goodput" id="goodput">' in page


def test_bad_input_of_the_command_is_one_sentence(tmp_path: Path) -> None:
    finished = shardline("report", tmp_path / "nothing")
    assert finished.returncode == 2
    assert (
        finished.stderr
        == f"error: {tmp_path / 'nothing'} is not a run folder: it has no config.yaml; check the path.\n"
    )


class Page:
    """A report in a browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, file: Path, size: tuple[int, int], theme: str) -> None:
        """Open a file as on a device of this size, by touch on a phone, under a system theme."""
        is_phone = size == _PHONE
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": is_phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": is_phone})
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        # All pages of a folder share what the theme button leaves there; a browser's first page has no storage.
        self.run("try { localStorage.clear() } catch {}")
        self.logs("performance")
        self.driver.get(file.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page; returns what it returns."""
        return self.driver.execute_script(script, *arguments)

    def logs(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call."""
        return list(self.driver.get_log(kind))

    def errors(self) -> list[dict[str, Any]]:
        """Errors of scripts and of the content policy."""
        return [entry for entry in self.logs("browser") if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """Addresses that were asked for, other than of the page itself and of data inside it."""
        messages = [json.loads(entry["message"])["message"] for entry in self.logs("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert len(urls) >= 1
        return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]

    def until(self, script: str, what: str) -> Any:
        """Wait for a script to return something true; returns it."""
        return WebDriverWait(self.driver, 30).until(lambda _: self.run(f"return {script}"), what)

    def click(self, selector: str) -> None:
        """Click, as a person does."""
        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element(element).click().perform()

    def see_all(self) -> None:
        """Scroll through the page and wait for each plot to be drawn."""
        for plot in self.driver.find_elements(By.CSS_SELECTOR, ".plot"):
            self.run("arguments[0].scrollIntoView({block: 'center'})", plot)
            WebDriverWait(self.driver, 30).until(
                lambda _, plot=plot: self.run("return arguments[0].querySelector('.scatterlayer .trace path')", plot),
                "a curve",
            )

    def plot(self, title: str) -> str:
        """A script's name for the plot with this title; scrolls there."""
        index = self.run(
            "const titles = [...document.querySelectorAll('.panel h3')].map((title) => title.textContent);"
            "const index = titles.indexOf(arguments[0]);"
            "document.querySelectorAll('.plot')[index]?.scrollIntoView({block: 'center'}); return index",
            title,
        )
        assert index >= 0, title
        plot = f"document.querySelectorAll('.plot')[{index}]"
        self.until(f"{plot}.querySelector('.scatterlayer .trace')", title)
        return plot


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser."""
    with browser(tmp_path_factory.mktemp("browser")) as driver:
        yield Page(driver)


@pytest.fixture(scope="module")
def reports(run_dir: Path, quickstart_dir: Path) -> dict[str, Path]:
    """One report of each run, and one of both."""
    folder = run_dir.parent.parent
    found = {"tiny": folder / "tiny.html", "quickstart": folder / "quickstart.html", "both": folder / "both.html"}
    trained(shardline("report", run_dir, "--to", found["tiny"]))
    trained(shardline("report", quickstart_dir, "--to", found["quickstart"]))
    trained(shardline("report", quickstart_dir, run_dir, "--to", found["both"]))
    return found


_LOOKS = """
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const ground = (element) => {
  const own = getComputedStyle(element).backgroundColor;
  return own.endsWith(", 0)") || own === "transparent" ? ground(element.parentElement) : own;
};
const seen = (element) => element.getClientRects().length > 0;
const texts = [...document.querySelectorAll("h1, h2, h3, p, dt, dd b, dd span, button, summary, th, td, pre, label")]
  .filter((element) => seen(element) && element.textContent.trim());
const curves = [...document.querySelectorAll(".scatterlayer .js-line")];
const labels = [...document.querySelectorAll(".plot :is(.xtick, .ytick, .g-xtitle, .g-ytitle) text")];
const controls = [...document.querySelectorAll("button, summary, input")].filter(seen)
  .map((element) => (element.type === "checkbox" ? element.closest("label") : element));
return {
  text: Math.min(...texts.map((element) => contrast(getComputedStyle(element).color, ground(element)))),
  label: Math.min(...labels.map((label) => contrast(getComputedStyle(label).fill, ground(label.closest(".plot"))))),
  curve: Math.min(...curves.map((line) => contrast(getComputedStyle(line).stroke, ground(line.closest(".plot"))))),
  ground: luminance(getComputedStyle(document.body).backgroundColor),
  small: controls.filter((element) => {
    const box = element.getBoundingClientRect();
    return box.height < arguments[0] || box.width < arguments[0];
  }).map((element) => `${element.outerHTML.slice(0, 80)} ${element.getBoundingClientRect().height}`),
  untitled: [...document.querySelectorAll(".plot")]
    .filter((plot) => !plot.layout.xaxis.title.text || !plot.layout.yaxis.title.text).length,
};
"""


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [_DESK, _PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("name", ["tiny", "quickstart", "both"])
def test_a_page_is_right_at_each_width_and_in_each_theme(
    page: Page, reports: dict[str, Path], name: str, size: tuple[int, int], theme: str
) -> None:
    page.open(reports[name], size, theme)
    page.run("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    page.see_all()
    assert page.run("return document.querySelectorAll('.plot').length") >= 10
    width, inner = page.run("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width == inner <= size[0]
    looks = page.run(_LOOKS, _TAP_TARGET_PX)
    assert (looks["ground"] < 0.1) == (theme == "dark")
    assert looks["text"] >= _TEXT_CONTRAST
    assert looks["label"] >= _TEXT_CONTRAST
    assert looks["curve"] >= _CURVE_CONTRAST
    assert looks["untitled"] == 0
    if size == _PHONE:
        assert looks["small"] == []
    assert page.errors() == []
    assert page.requests() == []
    assert page.run("return performance.getEntriesByType('resource').length") == 0


@needs_browser
def test_a_plot_is_used(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["quickstart"], _DESK, "light")
    loss = page.plot("Training and held-out loss")
    assert page.run(f"return {loss}.data.map((trace) => trace.x.length)") == [30, 3]
    assert page.run(f"return {loss}.layout.yaxis.type") == "linear"

    page.click("[data-log]")
    assert page.until(f"{loss}.layout.yaxis.type === 'log'", "a logarithmic axis")

    page.click("[data-axis='tokens']")
    page.until(f"{loss}.layout.xaxis.title.text === 'Tokens'", "tokens")
    assert page.run(f"return {loss}.data[0].x.slice(0, 2)") == [40960, 81920]
    page.click("[data-axis='hours']")
    page.until(f"{loss}.layout.xaxis.title.text === 'Hours of training'", "hours")
    assert page.run(f"return {loss}.data[0].x[0]") == pytest.approx(10 * 0.6088030054999762 / 3600, rel=1e-6)
    page.click("[data-axis='step']")

    page.run("const s = document.getElementById('smoothing'); s.value = 0.5; s.dispatchEvent(new Event('input'))")
    page.until(f"{loss}.data.length === 3", "a smoothed curve beside the training loss")
    raw, smoothed = page.run(f"return [{loss}.data[0].y, {loss}.data[1].y]")
    assert smoothed[0] == pytest.approx(raw[0])
    assert smoothed[1] == pytest.approx((raw[0] / 4 + raw[1] / 2) / 0.75)
    page.run("const s = document.getElementById('smoothing'); s.value = 0; s.dispatchEvent(new Event('input'))")
    page.until(f"{loss}.data.length === 2", "the curves as they were")

    page.click("[data-toggle-line='1']")
    page.until(f"{loss}.data.length === 1", "the evaluation loss gone")
    page.click("[data-toggle-line='1']")
    page.until(f"{loss}.data.length === 2", "the evaluation loss back")
    assert page.errors() == []


@needs_browser
def test_hovering_shows_step_and_value_and_dragging_zooms(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["quickstart"], _DESK, "dark")
    loss = page.plot("Training and held-out loss")
    area = page.driver.find_element(By.CSS_SELECTOR, ".plot .nsewdrag")
    ActionChains(page.driver).move_to_element(area).pause(0.5).move_by_offset(3, 2).perform()
    page.until(f"{loss}.querySelector('.hoverlayer .legend')", "values under the pointer")
    text = page.run(f"return {loss}.querySelector('.hoverlayer').textContent")
    assert text.startswith("step 1")
    assert "training" in text

    before = page.run(f"return {loss}.layout.xaxis.range")
    ActionChains(page.driver).move_to_element(area).click_and_hold().move_by_offset(150, 0).pause(
        0.3
    ).release().perform()
    page.until(f"{loss}.layout.xaxis.range[0] > 100", "a closer view")
    after = page.run(f"return {loss}.layout.xaxis.range")
    assert after[1] - after[0] < (before[1] - before[0]) / 2
    page.click("#theme")
    page.until("document.documentElement.dataset.theme === 'light'", "the other theme")
    assert page.run(f"return {loss}.layout.xaxis.range") == after
    assert page.errors() == []


@needs_browser
def test_the_theme_is_switched_and_remembered_against_the_systems(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["tiny"], _PHONE, "dark")
    loss = page.plot("Training and held-out loss")
    dark = page.run(f"return [getComputedStyle(document.body).backgroundColor, {loss}.data[0].line.color]")
    page.click("#theme")
    page.until("document.getElementById('theme').textContent === 'Dark theme'", "the light theme")
    page.plot("Training and held-out loss")
    light = page.run(f"return [getComputedStyle(document.body).backgroundColor, {loss}.data[0].line.color]")
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    page.driver.refresh()
    assert page.run("return document.documentElement.dataset.theme") == "light"
    page.click("#drag")
    page.plot("Training and held-out loss")
    page.until(f"{loss}.layout.dragmode === 'zoom'", "zooming by touch")
    assert page.errors() == []


@needs_browser
def test_two_runs_are_compared(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["both"], _DESK, "light")
    loss = page.plot("Training and held-out loss")
    names = ["quickstart, training", "quickstart, evaluation", "tiny, training", "tiny, evaluation"]
    assert page.run(f"return {loss}.data.map((trace) => trace.name)") == names
    colours = page.run(f"return {loss}.data.map((trace) => trace.line.color)")
    assert colours[0] == colours[1] != colours[2] == colours[3]
    page.click("[data-toggle-run='0']")
    page.until(f"{loss}.data.length === 2", "one run less")
    assert page.run(f"return {loss}.data.map((trace) => trace.name)") == names[2:]
    page.click("[data-toggle-run='0']")

    page.click("#configuration summary")
    page.until("!document.getElementById('configuration').open", "the configuration closed")
    page.click("#configuration summary")
    rows = """[...document.querySelectorAll('#configuration tbody tr')].filter((row) => row.getClientRects().length)
        .map((row) => [row.classList.contains('differs'), ...[...row.cells].map((cell) => cell.textContent)])"""
    page.until(f"{rows}.length", "the configuration opened")
    different = page.run(f"return {rows}")
    assert all(row[0] for row in different)
    assert [True, "optimizer.lr", "0.004", "0.01"] in different
    page.click("#only-differences")
    everything = page.run(f"return {rows}")
    assert [False, "optimizer.name", "adamw", "adamw"] in everything
    assert len(everything) > len(different) > 5
    assert page.errors() == []


@needs_browser
def test_what_a_run_brings_stays_text(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["quickstart"], _DESK, "light")
    assert page.run("return document.querySelector('.excerpt pre').textContent") == _HOSTILE
    assert page.run("return [window.broken ?? null, document.images.length]") == [None, 0]
    page.open(reports["tiny"], _DESK, "light")
    attempts = page.run("return document.querySelector('#attempts tbody').innerText")
    assert "from the start" in attempts
    assert "after step 4" in attempts
    assert "parallel.strategy: zero2 to ddp" in attempts
