"""The page by which a model is tried, in a browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import browser, needs_browser
from tests.trainer.serving.serving_support import (
    DIGITS,
    TABLE,
    digits_answer,
    digits_folder,
    serving,
    table_folder,
)

_HOSTILE = '<img src=x onerror="window.broken=1">'
_TAP_TARGET_PX = 44

pytestmark = needs_browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with browser(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


def said(driver: webdriver.Chrome, words: str) -> str:
    """What the page says, once it has these words."""

    def text(_: Any) -> str | None:
        found = driver.find_element(By.ID, "said").text
        return found if words in found else None

    return str(WebDriverWait(driver, 20).until(text, f"{words} in {driver.find_element(By.ID, 'said').text!r}"))


def until_ready(driver: webdriver.Chrome) -> None:
    WebDriverWait(driver, 20).until(lambda _: driver.find_elements(By.ID, "ask"), "a form")


def assert_clean(driver: webdriver.Chrome, url: str) -> None:
    """No error of a script or of the content policy, and nothing asked of anybody else."""
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(urls) >= 1
    assert [asked for asked in urls if not asked.startswith((url, "data:"))] == []
    assert driver.execute_script("return window.broken") is None
    width, inner = driver.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width == inner


def test_a_digit_is_drawn_and_named(driver: webdriver.Chrome, tmp_path: Path) -> None:
    folder = digits_folder(tmp_path / "digits")
    # Pixels of files, so that a file may be chosen as well.
    (folder / "rows.json").write_text(DIGITS.model_copy(update={"max_pixel": 255}).model_dump_json())
    with serving(folder) as server:
        driver.get_log("performance")
        driver.set_window_size(390, 844)
        driver.get(server.url)
        until_ready(driver)
        cells = driver.find_elements(By.CSS_SELECTOR, "#grid span")
        assert len(cells) == 64
        drawn = [10, 18, 26]
        for index in drawn:
            ActionChains(driver).move_to_element(cells[index]).click().perform()
        button = driver.find_element(By.ID, "ask")
        assert button.size["height"] >= _TAP_TARGET_PX
        button.click()
        pixels = [255 if index in drawn else 0 for index in range(64)]
        expected = digits_answer(pixels)
        said(driver, str(expected.argmax()))
        WebDriverWait(driver, 20).until(lambda _: driver.find_elements(By.CSS_SELECTOR, "#answer tr"))
        shown = [row.text.split() for row in driver.find_elements(By.CSS_SELECTOR, "#answer tr")]
        order = np.argsort(-expected)
        assert [row[0] for row in shown] == [DIGITS.classes[index] for index in order]
        assert [float(row[-1]) for row in shown] == pytest.approx(expected[order], abs=1e-4)
        driver.find_element(By.CSS_SELECTOR, "#as-curl summary").click()
        assert (
            json.dumps({"rows": [{"pixels": pixels}]}, separators=(",", ":")) in driver.find_element(By.ID, "curl").text
        )
        assert_clean(driver, server.url)
        image = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / "picture.png")
        driver.find_element(By.ID, "file").send_keys(str(tmp_path / "picture.png"))
        driver.find_element(By.ID, "ask").click()
        expected = digits_answer(image)
        WebDriverWait(driver, 20).until(
            lambda _: (
                driver.find_elements(By.CSS_SELECTOR, "#answer tr td")
                and driver.find_element(By.CSS_SELECTOR, "#answer tr td").text == DIGITS.classes[expected.argmax()]
            )
        )
        said(driver, DIGITS.classes[expected.argmax()])
        assert_clean(driver, server.url)
        driver.get(f"{server.url}/docs")
        assert "POST /predict" in driver.find_element(By.TAG_NAME, "body").text
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_key_and_names_that_are_no_html(driver: webdriver.Chrome, tmp_path: Path) -> None:
    column = TABLE.categories[0].model_copy(update={"values": [_HOSTILE, "Oslo"]})
    recipe = TABLE.model_copy(update={"features": ["age", _HOSTILE], "categories": [column]})
    with serving(table_folder(tmp_path / "table", recipe), "--api-key-env", "MY_KEY", MY_KEY="secret") as server:
        driver.get_log("performance")
        driver.get(server.url)
        said(driver, "This server needs a key.")
        # The browser tells of a status of 401 as of an error.
        driver.get_log("browser")
        driver.find_element(By.ID, "key").send_keys("secret")
        driver.find_element(By.ID, "use-key").click()
        until_ready(driver)
        driver.find_element(By.ID, "column-0").send_keys("50")
        driver.find_element(By.ID, "category-0").send_keys("Oslo")
        driver.find_element(By.ID, "ask").click()
        said(driver, "700")
        assert _HOSTILE in driver.find_element(By.ID, "row").text
        driver.find_element(By.ID, "column-1").send_keys("1e38")
        driver.find_element(By.ID, "ask").click()
        assert "422: row 0: " in said(driver, "422")
        driver.get_log("browser")
        assert_clean(driver, server.url)
