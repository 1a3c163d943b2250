"""Takes the screenshots of docs/demo.md: python docs/demo_pictures.py URL

URL is that of a running demo of the digits. Needs playwright and Chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright  # pyright: ignore

FOLDER = Path(__file__).with_name("demo")
WAIT = 120_000  # milliseconds


def wait_for(page: Page, selector: str, text: str) -> None:
  """Waits until an element shows a text."""
  page.wait_for_function(
    "([s, t]) => document.querySelector(s).innerText.includes(t)",
    arg=[selector, text],
    timeout=WAIT,
  )
  page.wait_for_timeout(1000)  # for the pictures


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  with sync_playwright() as playwright:
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    path = "/usr/bin/chromium"
    browser = playwright.chromium.launch(executable_path=path, args=options)
    page = browser.new_page(viewport={"width": 1180, "height": 1000})
    page.goto(sys.argv[1])
    page.click("#draw-classes input")
    page.keyboard.press("Backspace")
    for name in "3140":
      page.keyboard.type(name)
      page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.click("#draw-go")
    wait_for(page, "#draw-status", "Done")
    page.screenshot(path=FOLDER / "draw.png", full_page=True)
    page.get_by_role("tab", name="Look inside").click()
    wait_for(page, "#inside-status", "tokens kept")
    page.screenshot(path=FOLDER / "inside.png", full_page=True)
    browser.close()


if __name__ == "__main__":
  main()
