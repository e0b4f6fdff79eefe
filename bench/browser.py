"""A headless Chromium for measurements and pictures of the page.

What it is: the one place that starts it. What it is not: what the tests use (tests/web_page.py),
which skip where it is missing.
"""

import shutil
from typing import Any


def chromium(*arguments: str) -> Any:
    """A selenium driver; ends the program where Chromium or its driver is missing."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        raise SystemExit("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", *arguments):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=Service(driver))
