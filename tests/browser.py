"""Headless Chromium, as the tests of pages drive it."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # the tests may run as root, whom Chromium's sandbox refuses
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


class NoBrowser(Exception):
    """Chromium or its driver is not on this machine."""


def found(*names: str) -> str:
    """The first of some programs that is installed.

    Raises:
        NoBrowser: none is.
    """
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise NoBrowser(
        f"{names[0]}: not installed, but a page is tested in a browser. Fix: apt-get install chromium chromium-driver "
        "(Debian), or put Chrome and its ChromeDriver on the PATH."
    )


@contextmanager
def browser() -> Iterator[Chrome]:
    """A browser that keeps what pages write to their console.

    Raises:
        NoBrowser: there is none.
    """
    options = ChromeOptions()
    options.binary_location = found("chromium", "chromium-browser", "google-chrome")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = Chrome(options=options, service=Service(found("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def resize(driver: Chrome, width: int, height: int = 900) -> None:
    """Make the page's window that wide, in pixels: as a telephone's, too, which no window of the desktop is."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def complaints(driver: Chrome) -> list[str]:
    """What pages wrote to the console since the last call, uncaught errors included."""
    return [entry["message"] for entry in driver.get_log("browser")]


def photograph(driver: Chrome, path: Path) -> None:
    """The whole page as PNG, below the window's edge, too."""
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(taken["data"]))
