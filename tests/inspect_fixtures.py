"""Scored rows for the inspection page, hostile ones among them, and the browser that opens it."""

import shutil
from pathlib import Path

import pytest
from selenium import webdriver

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
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
