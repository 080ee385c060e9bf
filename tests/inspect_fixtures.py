"""Scored rows for the inspection page, hostile ones among them; the browser that opens it, and reading and working the
page in it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

HOSTILE = (
    "<script>alert('pwned')</script><img src=x onerror=alert(1)><svg onload=alert(2)>",
    "</script><script>alert(3)</script><!--<script> ]]> &lt;b&gt; &amp; {{data}} ${1}",
    '"><iframe srcdoc="<script>alert(4)</script>"></iframe><base href="http://localhost:1/">',
    "abc \u202edef\u202c ghi \u2067jkl\u2069 mno \u202e never closed \u2066 nor this",
    "\u0645\u0631\u062d\u0628\u0627, this is mixed \u05e9\u05dc\u05d5\u05dd",
    "ze\u200bro \u200d\u200c\ufeff wi\u00addth \u2060\U000e0041",
    "lone \ud800 and \udfff surrogates \ud83d",
    "NUL \x00 ESC \x1b[31m CRLF \r\n tab\tend \x85 \u2028 line",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467 combining z\u0351\u0351 \u4e2d\u6587\u6ca1\u6709\u7a7a\u683c",
    "x" * 50_000,
    "lorem ipsum dolor sit " * 2_500,
    "\n\n  lines and spaces \n\n",
)


def scored_row(text: str, number: int = 0, **fields: object) -> dict:
    """A scored row with the text in every field that can hold it."""
    row = {
        "id": f"{text[:60]} {number}",
        "prompt": [{"role": "system", "content": text}, {"role": "user", "content": f"{text}?"}],
        "chosen": f"kept {text} <b>new</b> end",
        "rejected": f"kept {text} old end",
        "teacher_response": f"teacher {text}",
        "diagnosis": text,
        "edit_similarity": 0.5,
        "rejected_score": 3.0,
        "chosen_score": 7.0,
        "margin": 4.0,
        "original_chosen": f"original {text}",
        "original_chosen_score": 8.0,
    }
    return row | fields


PATIENCE = 300  # seconds, for a machine that has other things to do
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-default-apps"
)


def start_browser(profile: Path) -> webdriver.Chrome:
    """Headless Chromium that keeps logs of its console and its requests; skips the test where there is no Chromium."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}", "--window-size=1366,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.unhandled_prompt_behavior = "ignore"  # an alert must stay for the test to see it
    driver = shutil.which("chromedriver")
    assert driver, "chromium is here and chromedriver is not: apt-get install chromium-driver"
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(PATIENCE)
    return browser


def requests_of(browser) -> list[str]:
    """Addresses that were asked for since the log was last read; `data:` ones stay in the page."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


def read(browser, script: str, *arguments: object) -> object:
    """What the script returns, by way of JSON, which unlike the driver's protocol keeps lone surrogates."""
    return json.loads(browser.execute_script(f"return JSON.stringify((() => {{ {script} }})())", *arguments))


def texts(browser, selector: str) -> list[str]:
    return read(browser, f"return [...document.querySelectorAll({selector!r})].map((node) => node.textContent)")


def status(browser) -> str:
    return browser.find_element(By.ID, "status").text


def count_found(browser) -> int:
    """The number the page says it found (or has)."""
    match = re.search(r" of ([\d,]+) row", status(browser))
    return int(match[1].replace(",", "")) if match else 0


def search(browser, text: str) -> None:
    """Type it, and wait until the page has searched for it."""
    box = browser.find_element(By.ID, "search")
    box.send_keys(Keys.CONTROL + "a")
    box.send_keys(text or Keys.BACKSPACE)
    WebDriverWait(browser, PATIENCE).until(lambda _: box.get_property("value") == text)
    browser.execute_script("document.getElementById('status').textContent = 'searching'")
    box.send_keys(Keys.ENTER)
    WebDriverWait(browser, PATIENCE).until(lambda _: status(browser) != "searching")


def sort(browser, value: str) -> None:
    Select(browser.find_element(By.ID, "sort")).select_by_value(value)


def ids_on_all_pages(browser) -> list[str]:
    ids = texts(browser, ".card .id")
    while (following := browser.find_elements(By.CSS_SELECTOR, "#tools .pager button")[1]) and (
        following.get_attribute("aria-disabled") == "false"
    ):
        following.click()
        ids += texts(browser, ".card .id")
    return ids
