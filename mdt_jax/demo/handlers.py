"""What happens at a click on the page: the handlers of its events.

Handlers call the engine and the viewer, and turn errors into sentences on the page.
"""

from __future__ import annotations

import html
import io
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np
from PIL import Image

from mdt_jax.demo import figures, uploads
from mdt_jax.demo.engine import MAX_SCALE, Engine, Progress, Settings
from mdt_jax.demo.inside import Question, View, Viewer
from mdt_jax.errors import SettingError, one_line, reason_of_machine
from mdt_jax.logs import logger
from mdt_jax.sampling.pictures import to_pil

PAINT, CHANGE = "Paint the brushed part", "Change the whole picture"
KEPT_SECONDS = 600  # that files of the page are kept for downloads
STATUS_EVERY = 0.25  # seconds between two updates of the progress


class Handlers:
  """The handlers of the page of one engine.

  Args:
    engine: draws the pictures.
    viewer: looks inside the network.
    folder: folder for files that the page offers for download.
  """

  def __init__(self, engine: Engine, viewer: Viewer, folder: Path):
    self._engine = engine
    self._viewer = viewer
    self._folder = folder
    self._choices = engine.classes()
    self._labels = dict(self._choices)

  def curve(self, scale: float, power: float) -> Any:
    """Draws the curve of guidance."""
    try:
      scale, power = min(float(scale), MAX_SCALE), min(float(power), MAX_SCALE)
      defaults = self._engine.defaults()
      settings = Settings(defaults.labels, 1, 0, 2, defaults.method, scale, power)
      return figures.curve(self._engine.scales(settings))
    except Exception as error:
      _explain(error)
      return gr.skip()

  def draw(self, *fields: Any) -> Iterator[Any]:
    """Draws pictures, with progress."""
    outputs = [gr.skip()] * 7
    try:
      settings = self._settings(fields)
      shell, python = self._engine.code(settings)
      outputs[3:5] = shell, python
      for shown in self._show(self._engine.draw(settings)):
        outputs[:3] = shown[:3]
        if (images := shown[3]) is not None:
          labels = self._engine.labels(settings)
          outputs[5] = {"images": images, "labels": labels}
          outputs[6] = {"pixels": images[0], "label": labels[0]}
        yield outputs
        outputs = [gr.skip()] * 7
    except Exception as error:
      yield [show_status(problem=_explain(error)), *[gr.skip()] * 6]

  def inpaint(
    self,
    chosen: Any,
    brush: Any,
    task: str,
    strength: float,
    interpolation: float,
    *fields: Any,
  ) -> Iterator[Any]:
    """Inpaints or edits the picture on the canvas, with progress."""
    outputs = [gr.skip()] * 6
    try:
      settings = self._settings(fields)
      picture = self._chosen(chosen)["pixels"]
      hidden, interpolates = None, self._engine.pipeline.model.takes_mask
      if task == PAINT:
        hidden = self._hidden(brush)
        steps = self._engine.inpaint(
          settings, picture, hidden, interpolation if interpolates else None
        )
        extra = {"inpaint": "image.png", "mask": "mask.png"}
        extra |= {"interpolation": interpolation} if interpolates else {}
      else:
        steps = self._engine.edit(settings, picture, strength)
        extra = {"edit": "image.png", "strength": strength}
      outputs[3:5] = self._engine.code(settings, extra)
      outputs[5] = gr.update(value=self._files(picture, hidden), visible=True)
      for shown in self._show(steps):
        outputs[:3] = shown[:3]
        yield outputs
        outputs = [gr.skip()] * 6
    except Exception as error:
      yield [show_status(problem=_explain(error)), *[gr.skip()] * 5]

  def look(
    self,
    chosen: Any,
    name: str,
    masked: float,
    noise: float,
    seed: float,
    token: int | None,
  ) -> list[Any]:
    """Shows the masked pass and the attention of a token."""
    try:
      start = time.monotonic()
      pixels = self._chosen(chosen)["pixels"]
      question = Question(
        pixels.tobytes(),
        pixels.shape,
        self._labels[name],
        float(masked),
        float(noise),
        int(seed or 0),
      )
      view = self._viewer.look(question)
      if token is None or not 0 <= token < view.removed.size:
        token = int(np.flatnonzero(~view.removed.ravel())[view.removed.size // 4 % 7])
      text = f"{(~view.removed).sum()} of {view.removed.size} tokens kept. {view.note}"
      logger.debug("looked inside in %.1f s", time.monotonic() - start)
      return [show_status(text), *self._view(view, pixels, token), token]
    except Exception as error:
      return [show_status(problem=_explain(error)), *[gr.skip()] * 10]

  def choose(self, drawn: Any, event: gr.SelectData) -> Any:
    """Takes the clicked picture of the grid for the other tabs."""
    if not drawn:
      return gr.skip(), gr.skip()
    images = drawn["images"]
    size = figures.grid(images).size
    number = figures.picture_at(_place(event), size, len(images))
    text = f"Picture {number + 1} is now in the tabs Inpaint and Look inside."
    return {"pixels": images[number], "label": drawn["labels"][number]}, show_status(
      text
    )

  def choose_token(self, event: gr.SelectData) -> int:
    """Returns the number of the clicked token."""
    rows, columns = self._viewer.grid
    height, width, _ = self._engine.image_shape
    shown = figures.show_kept(
      np.zeros((height, width, 1), np.uint8), np.zeros((rows, columns), bool)
    )
    x, y = _place(event)
    column = min(max(int(x * columns / shown.width), 0), columns - 1)
    row = min(max(int(y * rows / shown.height), 0), rows - 1)
    return row * columns + column

  def upload(self, data: bytes) -> Any:
    """Fits an uploaded picture and shows it on the canvas."""
    try:
      chosen = self._fit(data)
      text = "The picture is fitted. Brush over the part to paint."
      return chosen, self._canvas_value(chosen), show_status(text)
    except Exception as error:
      return gr.skip(), gr.skip(), show_status(problem=_explain(error))

  def upload_inside(self, data: bytes) -> Any:
    """Fits an uploaded picture for the tab Look inside."""
    try:
      return self._fit(data), show_status("The picture is fitted.")
    except Exception as error:
      return gr.skip(), show_status(problem=_explain(error))

  def show_on_canvas(self, chosen: Any, brush: Any) -> Any:
    """Shows the chosen picture when the tab Inpaint opens."""
    try:
      value = self._canvas_value(self._chosen(chosen))
    except SettingError:
      return gr.skip()
    is_shown = isinstance(brush, dict) and brush.get("image") == value["image"]
    return gr.skip() if is_shown else value

  def look_at_label(self, chosen: Any) -> Any:
    """The class of the chosen picture, when the tab Look inside opens."""
    chosen = chosen or self._engine.example
    if not chosen or chosen["label"] is None:
      return gr.skip()
    return next(n for n, label in self._choices if label == chosen["label"])

  def _settings(self, fields: tuple[Any, ...]) -> Settings:
    """The settings of the controls."""
    names, count, seed, steps, method, scale, power = fields
    names = names if isinstance(names, list) else [names] if names else []
    unknown = [name for name in names if name not in self._labels]
    if unknown:
      raise SettingError("class", unknown[0], "choose a class of the list")
    for name, value in (("seed", seed), ("steps", steps), ("guidance", scale)):
      if value is None:
        raise SettingError(name, "nothing", "give a number")
    return Settings(
      tuple(self._labels[name] for name in names),
      int(count),
      int(seed),
      int(steps),
      str(method),
      float(scale),
      float(power or 0),
    )

  def _show(self, steps: Iterator[Progress]) -> Iterator[tuple[Any, Any, Any, Any]]:
    """(status, grid, strip, finished pictures or None) while pictures are drawn."""
    start, said = time.monotonic(), 0.0
    yield show_status("Compiling and drawing ...", 0.0), gr.skip(), gr.skip(), None
    for at in steps:
      now = time.monotonic()
      if at.is_done:
        text = f"Done: {at.steps} calls of the network in {now - start:.1f} s."
        strip = figures.strip(at.stages)
        assert at.images is not None
        yield show_status(text, 1.0), figures.grid(at.images), strip, at.images
      elif at.images is not None or now - said > STATUS_EVERY:
        said = now
        grid = strip = gr.skip()
        if at.images is not None:
          grid, strip = figures.grid(at.images), figures.strip(at.stages)
        text = f"Step {at.step} of {at.steps}"
        yield show_status(text, at.step / at.steps), grid, strip, None

  def _view(self, view: View, pixels: np.ndarray, token: int) -> list[Any]:
    """The pictures of the tab Look inside."""
    shape = view.removed.shape
    kept = figures.show_kept(view.noisy, view.removed)
    tokens = figures.outline(figures.show_kept(pixels, view.removed), token, shape)

    def shown(image: np.ndarray | None) -> Image.Image | None:
      return (
        None if image is None else to_pil(figures.enlarge(figures.as_rgb(image), 320))
      )

    maps, captions = [], []
    for block in view.attention:
      weights = block.of_token(token)
      if weights is None:
        weights, captions = (
          np.zeros(1, np.float32),
          [*captions, f"{block.name}: unseen"],
        )
        maps.append(figures.heat(weights, np.zeros(0, int), shape))
      else:
        captions = [*captions, block.name]
        maps.append(figures.heat(weights, block.ids, shape))
    attention = figures.heat_maps(maps, captions, token) if maps else None
    return [
      tokens,
      shown(view.noisy),
      kept,
      shown(view.side),
      shown(view.unmasked if view.masked is None else view.masked),
      shown(view.tokens),
      shown(view.seen),
      shown(view.unmasked),
      attention,
    ]

  def _fit(self, data: bytes) -> dict[str, Any]:
    height, width, channels = self._engine.image_shape
    pixels = uploads.read_picture("upload", data or b"", (height, width), channels)
    return {"pixels": pixels, "label": None}

  def _chosen(self, chosen: Any) -> dict[str, Any]:
    chosen = chosen or self._engine.example
    if not chosen:
      raise SettingError("picture", "none", "upload a picture, or draw one first")
    return chosen

  def _canvas_value(self, chosen: dict[str, Any]) -> dict[str, Any]:
    pixels = chosen["pixels"]
    height, width = pixels.shape[:2]
    url = uploads.to_data_url(to_pil(pixels))
    return {"image": url, "mask": None, "width": width, "height": height}

  def _hidden(self, brush: Any) -> Any:
    """The brushed pixels of the canvas."""
    url = brush.get("mask") if isinstance(brush, dict) else None
    data = uploads.from_data_url("mask", url)
    height, width, _ = self._engine.image_shape
    if not data:
      return np.zeros((height, width), bool)
    return uploads.read_mask("mask", data, (height, width))

  def _files(self, picture: np.ndarray, hidden: np.ndarray | None) -> str:
    """A .zip file of the fitted picture and mask, for the command line."""
    for old in self._folder.glob("pictures_*.zip"):
      if time.time() - old.stat().st_mtime > KEPT_SECONDS:
        old.unlink(missing_ok=True)
    found = {"image.png": to_pil(picture)}
    if hidden is not None:
      found["mask.png"] = Image.fromarray(hidden.astype(np.uint8) * 255)
    with tempfile.NamedTemporaryFile(
      dir=self._folder, prefix="pictures_", suffix=".zip", delete=False
    ) as file:
      with zipfile.ZipFile(file, "w") as archive:
        for name, image in found.items():
          content = io.BytesIO()
          image.save(content, "PNG")
          archive.writestr(name, content.getvalue())
      return file.name


def show_status(text: str = "", share: float | None = None, problem: str = "") -> str:
  """The line above the pictures, with a bar for the share of the steps."""
  parts = []
  if problem:
    parts.append(f'<span class="problem" role="alert">{html.escape(problem)}</span>')
  elif text:
    parts.append(f"<span>{html.escape(text)}</span>")
  if share is not None:
    parts.append(f'<div class="bar"><div style="width:{share:.0%}"></div></div>')
  return f'<div class="status" role="status">{"".join(parts)}</div>'


def _place(event: Any) -> tuple[float, float]:
  x, y = event.index
  return float(x), float(y)


def _explain(error: Exception) -> str:
  """A sentence about an error, for the page; logs errors that are not the user's."""
  if isinstance(error, SettingError):
    return f"{error}."
  if (reason := reason_of_machine(error)) is not None:
    logger.warning("a picture failed: %s", reason)
    return f"The machine could not draw this: {reason}."
  logger.warning("a picture failed", exc_info=error)
  return f"Something went wrong: {type(error).__name__}: {one_line(error, 150)}."
