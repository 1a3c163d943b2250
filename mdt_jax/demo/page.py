"""The layout of the page: tabs, and what happens at a click.

The only module that imports gradio. Handlers are methods of `Page`; they call the
engine and the viewer, and turn errors into sentences on the page.
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

from mdt_jax.demo import canvas, figures, style, uploads
from mdt_jax.demo.engine import MAX_IMAGES, MAX_SCALE, Engine, Progress, Settings
from mdt_jax.demo.inside import MAX_MASKED, Question, View, Viewer
from mdt_jax.errors import SettingError, one_line, reason_of_machine
from mdt_jax.logs import logger
from mdt_jax.sampling.image_jobs import DEFAULT_INTERPOLATION, DEFAULT_STRENGTH
from mdt_jax.sampling.pictures import to_pil

COUNTS = (1, 4, 9, MAX_IMAGES)
PAINT, CHANGE = "Paint the brushed part", "Change the whole picture"
KEPT_SECONDS = 600  # that files of the page are kept for downloads
STATUS_EVERY = 0.25  # seconds between two updates of the progress
# Options of handlers that answer at once, and of those that wait for the device.
AT_ONCE = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
ON_DEVICE = {
  "api_visibility": "private",
  "show_progress": "hidden",
  "concurrency_id": "device",
}
MAPS_HINT = (
  "One map for each block, the mean over its heads. Bright: the clicked token (blue) "
  "looks here. Grey: a token that the block does not see."
)
SIDE_HINT = (
  "The picture Side-interpolater is what the output layer reads from the tokens right "
  "after the side-interpolater, without the decoder. The coloured tokens are their "
  "first three principal components: where the side-interpolater predicts a removed "
  "token well, both have the same colour."
)
NO_PICTURES = (
  "This network works on latents, and no autoencoder is loaded. The pictures are shown "
  "in false colours. Start the demo with --vae to inpaint, edit and look inside."
)


class Page:
  """The page of one engine.

  Args:
    engine: draws the pictures.
    viewer: looks inside the network.
    folder: folder for files that the page offers for download.
    max_queue: largest number of requests that wait; more are refused with a sentence.
  """

  def __init__(self, engine: Engine, viewer: Viewer, folder: Path, max_queue: int):
    self._engine = engine
    self._viewer = viewer
    self._folder = folder
    self._max_queue = max_queue
    self._choices = engine.classes()
    self._labels = dict(self._choices)

  def build(self) -> Any:
    """Returns the gradio Blocks of the page."""
    with gr.Blocks(
      title="mdt_jax",
      analytics_enabled=False,
      delete_cache=(60, KEPT_SECONDS),
    ) as blocks:
      gr.HTML(
        f"<h1>mdt_jax</h1><p>{html.escape(self._engine.describe())}</p>",
        elem_id="title",
      )
      # The picture that the tabs Inpaint and Look inside show: {"pixels", "label"}.
      chosen = gr.State(None)
      drawn = gr.State(None)  # the last pictures of the tab Draw, and their labels
      with gr.Tabs():
        with gr.Tab("Draw", id="draw"):
          self._draw_tab(chosen, drawn)
        with gr.Tab("Inpaint", id="inpaint") as tab:
          self._inpaint_tab(tab, chosen)
        with gr.Tab("Look inside", id="inside") as tab:
          self._inside_tab(tab, chosen)
    blocks.queue(max_size=self._max_queue, default_concurrency_limit=1)
    return blocks

  # Tabs

  def _draw_tab(self, chosen: Any, drawn: Any) -> None:
    with gr.Row():
      with gr.Column(scale=2, min_width=300):
        fields, go, stop = self._controls("Draw", "draw", many=True)
      with gr.Column(scale=5, min_width=400):
        status = gr.HTML(_status(), elem_id="draw-status")
        grid = _picture("Pictures", "draw-grid", 440)
        gr.HTML('<p class="hint">Click a picture to inpaint it or look inside.</p>')
        strip = _picture("From noise to picture", "draw-strip", 200)
        shell, python = _code("draw")
    run = go.click(
      self.draw,
      fields,
      [status, grid, strip, shell, python, drawn, chosen],
      **ON_DEVICE,
    )
    self._stop(stop, run, status)
    grid.select(self.choose, drawn, [chosen, status], **AT_ONCE)

  def _inpaint_tab(self, tab: Any, chosen: Any) -> None:
    if not self._engine.takes_pictures:
      gr.Markdown(NO_PICTURES)
      return
    has_side = self._engine.pipeline.model.takes_mask
    with gr.Row():
      with gr.Column(scale=2, min_width=300):
        brush = gr.HTML(
          {"image": None, "mask": None},
          html_template=canvas.TEMPLATE,
          css_template=canvas.CSS,
          js_on_load=canvas.SCRIPT,
          elem_id="brush",
        )
        upload = _upload("upload")
        task = gr.Radio([PAINT, CHANGE], value=PAINT, show_label=False, elem_id="task")
        strength = gr.Slider(
          0.05,
          1,
          DEFAULT_STRENGTH,
          step=0.05,
          label="How much to change",
          visible=False,
          elem_id="strength",
        )
        fields, go, stop = self._controls("Paint", "inpaint", many=False)
        interpolation = gr.Slider(
          0,
          1,
          DEFAULT_INTERPOLATION,
          step=0.05,
          label="Steps with the side-interpolater",
          visible=has_side,
        )
      with gr.Column(scale=5, min_width=400):
        status = gr.HTML(_status(), elem_id="inpaint-status")
        grid = _picture("Pictures", "inpaint-grid", 440)
        strip = _picture("From noise to picture", "inpaint-strip", 200)
        shell, python = _code("inpaint")
        files = gr.DownloadButton(
          "Download image.png and mask.png", visible=False, elem_id="inpaint-files"
        )
    tab.select(self.show_on_canvas, [chosen, brush], brush, **AT_ONCE)
    upload.upload(self.upload, upload, [chosen, brush, status], **AT_ONCE)
    task.change(
      lambda choice: (
        gr.update(visible=choice == CHANGE),
        gr.update(visible=has_side and choice == PAINT),
      ),
      task,
      [strength, interpolation],
      **AT_ONCE,
    )
    run = go.click(
      self.inpaint,
      [chosen, brush, task, strength, interpolation, *fields],
      [status, grid, strip, shell, python, files],
      **ON_DEVICE,
    )
    self._stop(stop, run, status)

  def _inside_tab(self, tab: Any, chosen: Any) -> None:
    if not self._engine.takes_pictures:
      gr.Markdown(NO_PICTURES)
      return
    viewer, names = self._viewer, [name for name, _ in self._choices]
    with gr.Row():
      with gr.Column(scale=2, min_width=300):
        tokens = _picture("Click a token", "tokens", 340)
        upload = _upload("inside-upload")
        masked = gr.Slider(
          0,
          MAX_MASKED,
          viewer.default_ratio(),
          step=0.05,
          label="Masked tokens",
          interactive=viewer.takes_mask,
          elem_id="masked",
        )
        noise = gr.Slider(0, 1, 0.4, step=0.05, label="Noise", elem_id="noise")
        label = gr.Dropdown(names, value=names[0], label="Class")
        seed = gr.Number(0, label="Seed of mask and noise", precision=0, minimum=0)
      with gr.Column(scale=5, min_width=400):
        status = gr.HTML(_status(), elem_id="inside-status")
        with gr.Row():
          noisy = _picture("Input with noise", "inside-noisy", 190, 120)
          kept = _picture("Kept tokens", "inside-kept", 190, 120)
          side = _picture("Side-interpolater", "inside-side", 190, 120)
          output = _picture("Output", "inside-output", 190, 120)
        maps = _picture("Attention of the clicked token", "maps", 330)
        gr.HTML(f'<p class="hint">{MAPS_HINT}</p>')
        with gr.Row():
          tokens_of = _picture("Tokens after the side-interpolater", "pca", 190, 120)
          seen = _picture("The same, all tokens seen", "pca-seen", 190, 120)
          whole = _picture("Output, all tokens seen", "inside-whole", 190, 120)
        if viewer.has_side:
          gr.HTML(f'<p class="hint">{SIDE_HINT}</p>')
    token = gr.State(None)
    inputs = [chosen, label, masked, noise, seed, token]
    pictures = [tokens, noisy, kept, side, output, tokens_of, seen, whole, maps]
    outputs = [status, *pictures, token]
    tab.select(self.look_at_label, chosen, label, **AT_ONCE).then(
      self.look, inputs, outputs, **ON_DEVICE
    )
    upload.upload(self.upload_inside, upload, [chosen, status], **AT_ONCE).success(
      self.look, inputs, outputs, **ON_DEVICE
    )
    options = {"trigger_mode": "always_last", **ON_DEVICE}
    for slider in (masked, noise):
      slider.release(self.look, inputs, outputs, **options)
    label.input(self.look, inputs, outputs, **options)
    seed.input(self.look, inputs, outputs, **options)
    tokens.select(self.choose_token, None, token, **AT_ONCE).then(
      self.look, inputs, outputs, **ON_DEVICE
    )

  def _controls(
    self, verb: str, task: str, *, many: bool
  ) -> tuple[list[Any], Any, Any]:
    """The fields of `Settings`, and the buttons that start and stop.

    Args:
      verb: text of the start button.
      task: "draw" or "inpaint"; prefix of the names of the elements.
      many: whether to choose several classes, for several pictures.

    Returns:
      (classes, count, seed, steps, sampler, guidance and its power), start, stop.
    """
    engine, defaults = self._engine, self._engine.defaults()
    names = [name for name, _ in self._choices]
    methods = engine.methods(task)
    classes = gr.Dropdown(
      names,
      value=names[:1] if many else names[0],
      multiselect=many,
      filterable=True,
      max_choices=MAX_IMAGES if many else None,
      label="Classes" if many else "Class",
      info="Type to search by name." if len(names) > 20 else None,
      elem_id=f"{task}-classes",
    )
    with gr.Row():
      count = defaults.count if many else 1
      number = gr.Dropdown(
        list(COUNTS), value=count, label="Pictures", min_width=80, filterable=False
      )
      seed = gr.Number(
        defaults.seed,
        label="Seed",
        precision=0,
        minimum=0,
        min_width=80,
        elem_id=f"{task}-seed",
      )
    with gr.Row():
      go = gr.Button(verb, variant="primary", min_width=120, elem_id=f"{task}-go")
      stop = gr.Button("Stop", min_width=80, elem_id=f"{task}-stop")
    steps = gr.Slider(
      1,
      engine.max_steps,
      defaults.steps,
      step=1,
      label="Steps",
      elem_id=f"{task}-steps",
    )
    sampler = gr.Dropdown(
      methods,
      value=defaults.method if defaults.method in methods else methods[0],
      label="Sampler",
    )
    scale = gr.Slider(
      1,
      10,
      defaults.scale,
      step=0.1,
      label="Guidance",
      interactive=engine.is_guided,
      elem_id=f"{task}-guidance",
    )
    power = gr.Slider(
      0,
      8,
      defaults.power,
      step=0.25,
      label="Guidance power",
      interactive=engine.is_guided,
    )
    curve = gr.HTML(figures.curve(engine.scales(defaults)))
    for slider in (scale, power):
      slider.change(
        self.curve, [scale, power], curve, trigger_mode="always_last", **AT_ONCE
      )
    return [classes, number, seed, steps, sampler, scale, power], go, stop

  def _stop(self, stop: Any, run: Any, status: Any) -> None:
    """Makes a button stop a run."""
    stop.click(None, cancels=[run], **AT_ONCE)
    stop.click(lambda: _status("Stopped."), None, status, **AT_ONCE)

  # Handlers

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
      yield [_status(problem=_explain(error)), *[gr.skip()] * 6]

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
      yield [_status(problem=_explain(error)), *[gr.skip()] * 5]

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
      return [_status(text), *self._view(view, pixels, token), token]
    except Exception as error:
      return [_status(problem=_explain(error)), *[gr.skip()] * 10]

  def choose(self, drawn: Any, event: gr.SelectData) -> Any:
    """Takes the clicked picture of the grid for the other tabs."""
    if not drawn:
      return gr.skip(), gr.skip()
    images = drawn["images"]
    size = figures.grid(images).size
    number = figures.picture_at(_place(event), size, len(images))
    text = f"Picture {number + 1} is now in the tabs Inpaint and Look inside."
    return {"pixels": images[number], "label": drawn["labels"][number]}, _status(text)

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
      return chosen, self._canvas_value(chosen), _status(text)
    except Exception as error:
      return gr.skip(), gr.skip(), _status(problem=_explain(error))

  def upload_inside(self, data: bytes) -> Any:
    """Fits an uploaded picture for the tab Look inside."""
    try:
      return self._fit(data), _status("The picture is fitted.")
    except Exception as error:
      return gr.skip(), _status(problem=_explain(error))

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

  # Helpers

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
    yield _status("Compiling and drawing ...", 0.0), gr.skip(), gr.skip(), None
    for at in steps:
      now = time.monotonic()
      if at.is_done:
        text = f"Done: {at.steps} calls of the network in {now - start:.1f} s."
        strip = figures.strip(at.stages)
        assert at.images is not None
        yield _status(text, 1.0), figures.grid(at.images), strip, at.images
      elif at.images is not None or now - said > STATUS_EVERY:
        said = now
        grid = strip = gr.skip()
        if at.images is not None:
          grid, strip = figures.grid(at.images), figures.strip(at.stages)
        text = f"Step {at.step} of {at.steps}"
        yield _status(text, at.step / at.steps), grid, strip, None

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


def _picture(caption: str, name: str, height: int, min_width: int = 200) -> Any:
  """A picture that the page shows, under a caption."""
  with gr.Column(min_width=min_width, elem_classes=["figure"]):
    gr.HTML(f'<p class="caption">{html.escape(caption)}</p>')
    return gr.Image(
      label=caption,
      show_label=False,
      height=height,
      interactive=False,
      format="png",
      type="pil",
      buttons=["download"],
      elem_id=name,
      elem_classes=["pixels"],
    )


def _upload(name: str) -> Any:
  """A button that uploads a picture."""
  types = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"]
  return gr.UploadButton(
    "Upload a picture", type="binary", file_types=types, size="sm", elem_id=name
  )


def _code(name: str) -> tuple[Any, Any]:
  """The boxes with the command line and the Python."""
  with gr.Accordion("The same pictures without the page", open=False):
    shell = gr.Code(language="shell", label="Command line", elem_id=f"{name}-shell")
    python = gr.Code(language="python", label="Python", elem_id=f"{name}-python")
  return shell, python


def _status(text: str = "", share: float | None = None, problem: str = "") -> str:
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


def theme() -> Any:
  """The look of the page, with fonts of the machine alone."""
  fonts = ["system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif"]
  base = gr.themes.Soft(
    primary_hue="blue",
    neutral_hue="slate",
    font=fonts,
    font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
  )
  return base.set(
    block_title_background_fill="transparent",
    block_title_text_color="*body_text_color",
    block_title_padding="0",
    block_title_text_weight="500",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    slider_color="*primary_600",
  )


STYLE = style.CSS
