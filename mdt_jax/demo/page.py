"""The layout of the page, in gradio: tabs, fields, and which handler a click calls."""

from __future__ import annotations

import hashlib
import html
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np
from gradio.data_classes import ImageData  # pyright: ignore[reportMissingImports]
from PIL import Image

from mdt_jax.demo import canvas, figures, style
from mdt_jax.demo.engine import MAX_IMAGES, Engine
from mdt_jax.demo.handlers import CHANGE, KEPT_SECONDS, PAINT, Handlers, show_status
from mdt_jax.demo.inside import MAX_MASKED, Viewer
from mdt_jax.sampling.image_jobs import DEFAULT_INTERPOLATION, DEFAULT_STRENGTH

COUNTS = (1, 4, 9, MAX_IMAGES)
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
    handlers: what happens at a click.
    max_queue: largest number of requests that wait; more are refused with a sentence.
  """

  def __init__(
    self, engine: Engine, viewer: Viewer, handlers: Handlers, max_queue: int
  ):
    self._engine = engine
    self._viewer = viewer
    self._do = handlers
    self._max_queue = max_queue
    self._choices = engine.classes()

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
        status = gr.HTML(show_status(), elem_id="draw-status")
        grid = _picture("Pictures", "draw-grid", 440)
        gr.HTML('<p class="hint">Click a picture to inpaint it or look inside.</p>')
        strip = _picture("From noise to picture", "draw-strip", 200)
        shell, python = _code("draw")
    run = go.click(
      self._do.draw,
      fields,
      [status, grid, strip, shell, python, drawn, chosen],
      **ON_DEVICE,
    )
    self._stop(stop, run, status)
    grid.select(self._do.choose, drawn, [chosen, status], **AT_ONCE)

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
        status = gr.HTML(show_status(), elem_id="inpaint-status")
        grid = _picture("Pictures", "inpaint-grid", 440)
        strip = _picture("From noise to picture", "inpaint-strip", 200)
        shell, python = _code("inpaint")
        files = gr.DownloadButton(
          "Download image.png and mask.png", visible=False, elem_id="inpaint-files"
        )
    tab.select(self._do.show_on_canvas, [chosen, brush], brush, **AT_ONCE)
    upload.upload(self._do.upload, upload, [chosen, brush, status], **AT_ONCE)
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
      self._do.inpaint,
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
        status = gr.HTML(show_status(), elem_id="inside-status")
        with gr.Row():
          noisy = _picture("Input with noise", "inside-noisy", 190, 120)
          kept = _picture("Kept tokens", "inside-kept", 190, 120)
          side = _picture("Side-interpolater", "inside-side", 190, 120)
          output = _picture("Output", "inside-output", 190, 120)
        maps = _picture("Attention of the clicked token", "maps", None)
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
    tab.select(self._do.look_at_label, chosen, label, **AT_ONCE).then(
      self._do.look, inputs, outputs, **ON_DEVICE
    )
    upload.upload(self._do.upload_inside, upload, [chosen, status], **AT_ONCE).success(
      self._do.look, inputs, outputs, **ON_DEVICE
    )
    options = {"trigger_mode": "always_last", **ON_DEVICE}
    for slider in (masked, noise):
      slider.release(self._do.look, inputs, outputs, **options)
    label.input(self._do.look, inputs, outputs, **options)
    seed.input(self._do.look, inputs, outputs, **options)
    tokens.select(self._do.choose_token, None, token, **AT_ONCE).then(
      self._do.look, inputs, outputs, **ON_DEVICE
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
      # With the seed that drew a picture, inpainting would paint the same again.
      seed = gr.Number(
        defaults.seed + (task != "draw"),
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
        self._do.curve, [scale, power], curve, trigger_mode="always_last", **AT_ONCE
      )
    return [classes, number, seed, steps, sampler, scale, power], go, stop

  def _stop(self, stop: Any, run: Any, status: Any) -> None:
    """Makes a button stop a run."""
    stop.click(None, cancels=[run], **AT_ONCE)
    stop.click(lambda: show_status("Stopped."), None, status, **AT_ONCE)


class _Picture(gr.Image):
  """A picture whose file is written once.

  gradio's own component writes the file of a picture again each time it is shown, and a
  browser that reads the file meanwhile gets a part of it.
  """

  is_template = True  # the frontend is that of gr.Image

  def postprocess(self, value: Any) -> Any:
    """Returns the file of a picture: a PIL image, an array, or a path."""
    if isinstance(value, np.ndarray):
      value = Image.fromarray(value)
    if not isinstance(value, Image.Image):
      return super().postprocess(value)
    content = io.BytesIO()
    value.save(content, "PNG")
    data = content.getvalue()
    folder = Path(self.GRADIO_CACHE) / hashlib.sha256(data).hexdigest()
    file = folder / "image.png"
    if not file.exists():
      folder.mkdir(parents=True, exist_ok=True)
      handle, partial = tempfile.mkstemp(dir=folder)
      with os.fdopen(handle, "wb") as opened:
        opened.write(data)
      os.replace(partial, file)
    return ImageData(path=str(file), orig_name=file.name)


def _picture(caption: str, name: str, height: int | None, min_width: int = 200) -> Any:
  """A picture that the page shows, under a caption; its own height if None."""
  with gr.Column(min_width=min_width, elem_classes=["figure"]):
    gr.HTML(f'<p class="caption">{html.escape(caption)}</p>')
    return _Picture(
      label=caption,
      show_label=False,
      height=height,
      interactive=False,
      format="png",
      type="pil",
      buttons=["download"],
      elem_id=name,
      elem_classes=["pixels"] if height else [],
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
