"""The pictures of docs/web.md, of the page that runs at an address: python docs/screenshots.py http://127.0.0.1:9465/.

`make demo` in another terminal is what they show; wait until its fleet has charged for some hours of its time.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).with_name("images")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DESKTOP = {"width": 1180, "height": 900}
PHONE = {"width": 390, "height": 844}


def shoot(page: Page, path: str, name: str) -> None:
    """Saves what is at the path, once its charts are drawn."""
    page.goto(path)
    page.locator("#connection[data-state=live]").wait_for()
    page.screenshot(path=IMAGES / f"{name}.png", clip={"x": 0, "y": 0, **page.viewport_size})


def main() -> None:
    """Saves all of them."""
    (address,) = sys.argv[1:]
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(base_url=address, viewport=DESKTOP, color_scheme="light")
        shoot(page, "/", "fleet")
        vehicle = page.locator("section:has(h2:text-is('Worst vehicles')) tbody a").first.get_attribute("href")
        faults = page.locator("section:has(h2:text-is('Which charger is at fault?')) tbody a")
        charger = faults.first.get_attribute("href")
        shoot(page, vehicle, "vehicle")
        shoot(page, "/ingest", "ingest")
        page = browser.new_page(base_url=address, viewport=DESKTOP, color_scheme="dark")
        shoot(page, charger, "charger")
        page = browser.new_page(base_url=address, viewport=PHONE, device_scale_factor=2, color_scheme="light")
        shoot(page, "/", "phone")


if __name__ == "__main__":
    main()
