"""The page in headless Chromium, opened from disk; skipped where Chromium, its driver or Selenium is missing."""

import dataclasses
import shutil

import numpy as np
import pytest

from oapl_jax.io.json_lines import LineFile
from oapl_jax.report import report
from oapl_jax.rollouts import diagnostics
from oapl_jax.rollouts.log import RolloutLog
from test_report import add_evaluations, make_group, make_run

webdriver = pytest.importorskip("selenium.webdriver", reason="needs Selenium (requirements-dev.txt)")
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium: apt-get install chromium chromium-driver"),
]
TABS = ["Overview", "Curves", "Held-out", "Rollouts", "Run"]
HOSTILE = "</script><img src=x onerror='window.pwned=1'><b>bold</b>\x1b[31m\u202e"


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("browser") / "demo")
    add_evaluations(run_dir, [0, 1, 2, 3], [4, 1, 4, 4])
    group = make_group(7, 5, HOSTILE)
    without_answer = dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, answer=""))
    RolloutLog(run_dir / "rollouts").append([without_answer])
    learned = [np.array([-0.5, -3, -0.25], np.float32), np.array([-0.4, -0.5, 2], np.float32)]
    (run_dir / "diagnostics").mkdir()
    line = diagnostics.line(100, [make_group(0, 3)], [learned], [0], lambda ids: ["<b>", "\n", ""][ids[0]])
    LineFile(run_dir / diagnostics.TOKEN_LOGPROBS_FILE).append(line)
    return report.write_report(run_dir).as_uri()


@pytest.fixture
def page(browser, address):
    """The page as it opens; nothing may have been written to the console in the end."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size(1280))
    browser.get("about:blank")
    browser.get(address)
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def size(width):
    return {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}


def all_of(page, selector):
    return page.find_elements("css selector", selector)


def click(page, selector, text):
    """Clicks the one element with this text."""
    (found,) = (element for element in all_of(page, selector) if element.text == text)
    found.click()


def rollouts(page):
    click(page, "nav button", "Rollouts")
    return all_of(page, ".rows button")


def press(page, *keys):
    webdriver.ActionChains(page).send_keys(*keys).perform()


def test_every_part_is_drawn(page):
    for tab, selector, least in (
        ("Overview", "figure svg .line", 3),
        ("Curves", "figure svg .line", 12),
        ("Held-out", "svg.matrix rect", 8),
        ("Rollouts", ".rows button", 8),
        ("Run", ".split div", 3),
    ):
        click(page, "nav button", tab)
        assert len(all_of(page, f"main {selector}")) >= least, tab
    assert "oapl-jax sft --config" in page.find_element("tag name", "main").text


def test_one_sample_of_a_prompt_gives_a_curve_over_steps(page, tmp_path):
    def titles():
        return [title.text for title in all_of(page, "figure figcaption b")]

    over_k = next(title for title in titles() if "over k" in title)
    run_dir = make_run(tmp_path / "demo", steps=3)
    (run_dir / "summary.json").write_text('{"before": {"pass@1": 0.25}, "after": {"pass@1": 0.5}}')
    page.get(report.write_report(run_dir).as_uri())
    for tab in ("Overview", "Held-out"):
        click(page, "nav button", tab)
        assert over_k not in titles()
        assert "Held-out pass@k" in titles()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(page, theme):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size(400))
    while page.execute_script("return document.documentElement.dataset.theme") != theme:
        page.find_element("id", "theme").click()
    for tab in TABS:
        click(page, "nav button", tab)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 400, tab
    rollouts(page)[0].click()
    assert page.execute_script("return document.querySelector('dialog').getBoundingClientRect().right") <= 400


CONTRAST = """
const channels = (text) => { const c = document.createElement("canvas").getContext("2d"); c.fillStyle = text; c.fillRect(0, 0, 1, 1);
  return [...c.getImageData(0, 0, 1, 1).data]; };
const over = (top, ground) => top.slice(0, 3).map((v, i) => (v * top[3] + ground[i] * (255 - top[3])) / 255);
const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => { const v = rgb[i] / 255; return sum + w * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
return [...document.querySelectorAll(".token")].map((token) => {
  const ground = channels(getComputedStyle(token.parentNode).backgroundColor), style = getComputedStyle(token);
  const pair = [light(over(channels(style.backgroundColor), ground)), light(channels(style.color))].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05); });
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_log_ratios_of_tokens_are_a_heat_map(page, theme):
    from selenium.webdriver.common.keys import Keys

    while page.execute_script("return document.documentElement.dataset.theme") != theme:
        page.find_element("id", "theme").click()
    (first, *_) = (row for row in rollouts(page) if "with log-ratios" in row.text)
    first.click()
    tokens = all_of(page, "dialog .token")
    assert [token.text for token in tokens] == ["<b>", "↵", "·"] * 2
    assert tokens[1].get_attribute("title") == "log-ratio -2.500: learner -3.000, sampler -0.500 nats"
    backgrounds = [token.value_of_css_property("background-color") for token in tokens]
    assert backgrounds[0] == backgrounds[4] != backgrounds[3] != backgrounds[2] != backgrounds[1]
    contrasts = page.execute_script(CONTRAST)
    assert len(contrasts) == 6
    assert min(contrasts) >= 4.5
    assert max(contrasts) > min(contrasts) + 1
    page.execute_script("arguments[0].focus()", tokens[0])
    press(page, Keys.ARROW_RIGHT)
    assert page.switch_to.active_element == tokens[1]
    assert 'Token 2, "\\n": log-ratio -2.500' in page.find_element("css selector", "dialog").text
    press(page, Keys.END)
    assert page.switch_to.active_element == tokens[2]
    press(page, Keys.TAB, Keys.HOME)
    assert page.switch_to.active_element == tokens[3]


def test_texts_of_rollouts_stay_texts(page):
    (first, *_) = rollouts(page)  # of the newest version
    first.click()
    dialog = page.find_element("css selector", "dialog[open]")
    for_people = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert [element.text for element in dialog.find_elements("css selector", ".group pre")] == [
        f"{for_people} 0",
        f"{for_people} 1",
    ]
    assert "null" not in dialog.text
    assert not all_of(page, "main b > *, dialog img, dialog .group b, main img")
    assert page.execute_script("return window.pwned") is None
    click(page, "dialog button", "close")
    assert not all_of(page, "dialog[open]")


def test_rollouts_are_searched_filtered_and_sorted(page):
    assert len(rollouts(page)) == 8
    search = page.find_element("css selector", "input[type=search]")
    search.send_keys("ONERROR")
    assert len(all_of(page, ".rows button")) == 2
    search.clear()
    search.send_keys(" ")  # of every prompt and response
    page.find_element("css selector", "select option[value=wrong]").click()
    found = all_of(page, ".rows button")
    assert len(found) == 4
    assert all(element.text.startswith("wrong") for element in found)
    versions = [element.text.partition("version ")[2][0] for element in found]
    assert versions == ["5", "3", "0", "0"]
    page.find_element("css selector", "input[type=checkbox]").click()
    assert all_of(page, ".rows button")[0].text.partition("version ")[2][0] == "0"


def test_a_cursor_is_shared_and_a_drag_zooms_all_charts(page):
    click(page, "nav button", "Curves")
    first, *_ = charts = all_of(page, "figure svg")
    webdriver.ActionChains(page).move_to_element(first).perform()
    assert len(all_of(page, "svg .cursor")) >= 8
    (tip,) = (element for element in all_of(page, ".tip") if element.is_displayed())
    assert tip.text.startswith("step ")
    labels = [chart.find_elements("css selector", "text") for chart in charts[:1]]
    before = [label.text for label in labels[0]]
    webdriver.ActionChains(page).move_to_element(first).click_and_hold().move_by_offset(60, 0).release().perform()
    assert [label.text for label in first.find_elements("css selector", "text")] != before
    click(page, "main button", "whole run")
    assert [label.text for label in first.find_elements("css selector", "text")] == before


def test_the_keyboard_reaches_everything(page):
    from selenium.webdriver.common.keys import Keys

    page.find_element("css selector", "nav button").send_keys(Keys.ARROW_RIGHT)
    assert page.find_element("css selector", "[aria-selected=true]").text == "Curves"
    first = page.find_element("css selector", "figure svg")
    page.execute_script("arguments[0].focus()", first)
    press(page, Keys.ARROW_LEFT)
    assert "step 99" in page.find_element("css selector", ".tip").text
    press(page, "+")
    assert page.find_element("css selector", ".unzoom").is_enabled()
    press(page, "0")
    assert not page.find_element("css selector", ".unzoom").is_enabled()
    rollouts(page)
    page.execute_script("document.querySelector('.rows button').focus()")
    press(page, Keys.ENTER)
    assert page.switch_to.active_element.text == "close"
    press(page, Keys.ESCAPE)
    assert not all_of(page, "dialog[open]")
