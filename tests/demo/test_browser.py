"""The page in a real browser: headless Chromium, driven by playwright."""

from __future__ import annotations

import importlib.util
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.demo.serving import INSTALL, NO_GRADIO, chromium

MISSING = [
  name
  for name, is_missing in (
    ("gradio", NO_GRADIO),
    ("playwright", importlib.util.find_spec("playwright") is None),
    ("Chromium", chromium() is None),
  )
  if is_missing
]
pytestmark = pytest.mark.skipif(
  bool(MISSING), reason=f"needs {', '.join(MISSING)}; {INSTALL}"
)
FLAGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
]
WAIT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    running = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
    yield running
    running.close()


@pytest.fixture
def page(browser, demo):
  """The page, loaded. At the end, its console must hold no error."""
  opened = browser.new_page(viewport={"width": 1280, "height": 1000})
  problems, outside = [], []
  opened.on("pageerror", lambda error: problems.append(str(error)))

  def note(message):
    if message.type == "error":
      problems.append(message.text)

  def watch(request):
    if not request.url.startswith((demo.url, "data:", "blob:")):
      outside.append(request.url)

  opened.on("console", note)
  opened.on("request", watch)
  opened.goto(demo.url)
  opened.wait_for_selector("#draw-go", timeout=WAIT)
  yield opened
  opened.close()
  assert problems == []
  assert outside == []  # no CDN, font or analytics


def wait_for(page, selector, text):
  page.wait_for_function(
    "([s, t]) => document.querySelector(s).innerText.includes(t)",
    arg=[selector, text],
    timeout=WAIT,
  )


def source_of(page, selector):
  """The pixels of a picture on the page, (H, W, 3)."""
  page.wait_for_selector(f"{selector} img", state="attached", timeout=WAIT)
  answer = page.request.get(page.get_attribute(f"{selector} img", "src"))
  return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB"))


def screenshot_of(page, selector):
  """The pixels of an element as the browser shows it."""
  data = page.locator(selector).screenshot()
  return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


def draw(page):
  page.click("#draw-go")
  wait_for(page, "#draw-status", "Done")


def open_tab(page, name):
  page.get_by_role("tab", name=name).click()


def upload(page, path):
  with page.expect_file_chooser() as chooser:
    page.click("#upload")
  chooser.value.set_files(path)


def stroke(page, start, end):
  """Brushes from one place of the canvas to another; shares of its sides."""
  page.wait_for_selector("#brush .empty", state="hidden", timeout=WAIT)
  box = page.locator("#brush .strokes").bounding_box()

  def place(at):
    return box["x"] + at[0] * box["width"], box["y"] + at[1] * box["height"]

  page.mouse.move(*place(start))
  page.mouse.down()
  page.mouse.move(*place(end), steps=8)
  page.mouse.up()


def test_draws_a_digit_by_name(page):
  page.click("#draw-classes input")
  page.keyboard.press("Backspace")
  page.keyboard.type("7")
  page.keyboard.press("Enter")
  page.keyboard.press("Escape")
  draw(page)
  pixels = source_of(page, "#draw-grid")
  assert pixels.shape[0] == pixels.shape[1]
  assert pixels.std() > 5
  page.get_by_text("The same pictures without the page").first.click()
  page.wait_for_selector("#draw-shell .cm-content", timeout=WAIT)
  assert re.search(r"--labels=7\b|--labels=7,", page.inner_text("#draw-shell"))
  shown = screenshot_of(page, "#draw-grid")
  assert shown.std() > 5
  assert source_of(page, "#draw-strip").std() > 5


def test_inpaints_under_a_brush_stroke(page):
  draw(page)
  open_tab(page, "Inpaint")
  stroke(page, (0.5, 0.3), (0.9, 0.3))
  page.click("#inpaint-go")
  wait_for(page, "#inpaint-status", "Done")
  before, after = source_of(page, "#draw-grid"), source_of(page, "#inpaint-grid")
  side = len(after) // 8
  first = before[: len(before) // 2, : len(before) // 2]  # one of four pictures
  small = first[:: len(first) // 8, :: len(first) // 8][:8, :8]
  painted = (after[::side, ::side][:8, :8] != small).any(axis=-1)
  assert painted.any()
  rows, columns = np.nonzero(painted)
  assert rows.min() >= 1 and rows.max() <= 3
  assert columns.min() >= 3
  page.wait_for_selector("#inpaint-files", timeout=WAIT)


def test_paint_without_a_stroke_says_what_is_missing(page):
  open_tab(page, "Inpaint")
  page.wait_for_selector("#brush .empty", state="hidden", timeout=WAIT)
  page.click("#inpaint-go")
  wait_for(page, "#inpaint-status", "brush over the part to paint")


def test_uploads_are_fitted_or_refused_with_a_sentence(page, tmp_path):
  picture, text = tmp_path / "photo.png", tmp_path / "text.png"
  Image.linear_gradient("L").resize((300, 200)).save(picture)
  text.write_text("no picture")
  open_tab(page, "Inpaint")
  upload(page, text)
  wait_for(page, "#inpaint-status", "cannot be read as a picture")
  upload(page, picture)
  wait_for(page, "#inpaint-status", "is fitted")
  stroke(page, (0.2, 0.2), (0.2, 0.7))
  page.click("#inpaint-go")
  wait_for(page, "#inpaint-status", "Done")


def test_mask_slider_and_a_click_look_inside(page):
  draw(page)
  open_tab(page, "Look inside")
  wait_for(page, "#inside-status", "tokens kept")
  before = source_of(page, "#inside-kept")
  page.focus("#masked input[type=range]")
  for _ in range(6):
    page.keyboard.press("ArrowRight")
  page.dispatch_event("#masked input[type=range]", "pointerup")
  wait_for(page, "#inside-status", "6 of 16 tokens kept")
  after = source_of(page, "#inside-kept")
  assert (after != before).any()
  for name in ("#inside-noisy", "#inside-side", "#inside-output", "#maps", "#pca"):
    assert source_of(page, name).std() > 1, name
  maps = page.get_attribute("#maps img", "src")
  box = page.locator("#tokens img").bounding_box()
  page.mouse.click(
    box["x"] + box["width"] * 0.87,
    box["y"] + box["height"] * 0.87,
  )
  page.wait_for_function(
    "src => document.querySelector('#maps img').src !== src", arg=maps, timeout=WAIT
  )


def test_page_fits_a_telephone(browser, demo):
  page = browser.new_page(viewport={"width": 390, "height": 844})
  page.goto(demo.url)
  page.wait_for_selector("#draw-go", timeout=WAIT)
  width = page.evaluate("document.documentElement.scrollWidth")
  page.close()
  assert width <= 390
