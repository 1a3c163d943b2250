"""The model card of a run: README.md on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from mdt_jax.atomic import read_json
from mdt_jax.buckets import AnyPath
from mdt_jax.checkpoints.loading import Checkpoint
from mdt_jax.errors import one_line
from mdt_jax.logs import counted, printable
from mdt_jax.pretrained.diffusers_folders import RELEASED_WEIGHTS
from mdt_jax.pretrained.tensors import flatten
from mdt_jax.settings import Settings

FILE = "README.md"
_SHOWN_NAMES = 20  # largest number of class names in a card
_CODE = "https://github.com/sail-sg/MDT"
_PAPERS = {
  "DiT": "arxiv:2212.09748",
  "SiT": "arxiv:2401.08740",
  "MDT": "arxiv:2303.14389",
  "MDTv2": "arxiv:2303.14389",
  "TREAD": "arxiv:2501.04765",
  "MicroDiT": "arxiv:2407.15811",
  "SPRINT": "arxiv:2510.21986",
  "MaskDiT": "arxiv:2306.09305",
}


def write_card(
  checkpoint: Checkpoint,
  settings: Settings,
  workdir: AnyPath,
  name: str,
  license: str | None = None,
) -> str:
  """Returns the text of the model card of a run.

  Args:
    checkpoint: parameters of the run.
    settings: settings of the run, without paths of this machine.
    workdir: folder of the run, whose scores the card lists: those of the same step and
      average that training (scores/step_N.json) or mdt_jax.evaluate
      (evaluation/scores.json, bpd.json) wrote.
    name: what people load: ORG/NAME, or the name of a folder.
    license: license, as the hub names it; None to state none.
  """
  parts = [
    _header(checkpoint, license),
    f"# {_text(name.rpartition('/')[2])}",
    _summary(checkpoint),
    _usage(checkpoint, settings, name),
    _table("Training", _training(checkpoint, settings)),
    _table("Network", _network(checkpoint)),
    _table("Process and sampler", _sampling(settings)),
    _table("Scores", _scores(checkpoint, workdir)),
  ]
  return "\n\n".join(part for part in parts if part) + "\n"


def _header(checkpoint: Checkpoint, license: str | None) -> str:
  """The YAML that the hub reads."""
  model: Any = checkpoint.experiment.model
  tags = ["diffusion", "image-generation", "jax", "flax"]
  if paper := _PAPERS.get(model.variant):
    tags += [model.variant.lower(), paper]
  lines = ["---"]
  lines += [f"license: {license}"] if license else []
  lines += [
    "library_name: mdt_jax",
    "pipeline_tag: unconditional-image-generation",
    "tags:",
    *(f"- {tag}" for tag in tags),
    "---",
  ]
  return "\n".join(lines)


def _summary(checkpoint: Checkpoint) -> str:
  experiment = checkpoint.experiment
  height, width, channels = experiment.model.input_shape
  what = "pixels" if experiment.holds_pixels else "latents"
  conditions = [f"the array {text}" for text in _arrays(checkpoint)]
  if experiment.model.conditioning.label is not None:
    classes = counted(experiment.model.num_classes, "class", "classes")
    conditions.insert(0, classes)
  code = f"under the names of the released PyTorch code ({_CODE})"
  if experiment.model.condition is not None:
    code += ", which has no layers for the arrays"
  return (
    f"{experiment.model_name}: a diffusion network of {height}x{width}x{channels} "
    f"{what} and {' and '.join(conditions)}, for mdt_jax. {RELEASED_WEIGHTS} holds "
    f"averaged parameters of step {checkpoint.step:,} {code}."
  )


def _arrays(checkpoint: Checkpoint) -> list[str]:
  """The arrays that a network is conditioned on, with their shapes."""
  arrays = checkpoint.experiment.model.conditioning.arrays().items()
  return [f"{_code(name)} ({', '.join(map(str, shape))})" for name, shape in arrays]


def _usage(checkpoint: Checkpoint, settings: Settings, name: str) -> str:
  experiment = checkpoint.experiment
  held = experiment.data_labels
  label = 0 if held is None else int(held.labels[0])
  arguments = [f"[{label}]"]
  conditioning = experiment.model.conditioning
  if arrays := conditioning.arrays():
    named = ", ".join(f"{json.dumps(name)}: …" for name in arrays)
    arguments = arguments * (conditioning.label is not None)
    arguments.append(f"condition={{{named}}}")
  draws_pictures = experiment.holds_pixels or settings.data.vae is not None
  draw = "images = pipeline" if draws_pictures else "latents = pipeline.draw"
  lines = [
    "## Use",
    "",
    "```python",
    "import mdt_jax",
    f"pipeline = mdt_jax.Pipeline.from_pretrained({json.dumps(printable(name))})",
    f"{draw}({', '.join(arguments)})",
    "```",
    "",
  ]
  if arrays:
    described = " and ".join(_arrays(checkpoint))
    lines += [
      f"The condition is made of arrays with a leading axis of images: {described}.",
      "",
    ]
  lines += [
    "Loading from the hub needs mdt_jax with its extra `hub`.",
  ]
  if not draws_pictures:
    lines[-1] += (
      " To decode the latents to images, pass `vae=` with the autoencoder that encoded "
      "the training data: a folder, or a name on the hub."
    )
  return "\n".join(lines)


def _training(checkpoint: Checkpoint, settings: Settings) -> Iterator[tuple[str, str]]:
  """Rows about the data and the run; `settings` hold no paths of this machine."""
  of_run = checkpoint.experiment.settings
  if checkpoint.step == 0:
    yield "steps", "unknown: the network was converted from a file of weights"
    return
  source = f"`{of_run.data.source}`"
  if settings.data.path:
    source += f": {_code(settings.data.path)}"
  yield "data", source
  held = checkpoint.experiment.data_labels
  if held is not None:
    text = counted(len(held.labels), "class", "classes")
    if held.names:
      text += ": " + ", ".join(_code(name) for name in held.names[:_SHOWN_NAMES])
      text += ", …" if len(held.names) > _SHOWN_NAMES else ""
    yield "classes in the data", text
  if of_run.data.vae is not None:
    vae = settings.data.vae
    yield "autoencoder", "a local folder" if vae is None else _code(vae)
  yield "steps", f"{checkpoint.step:,} of {of_run.num_steps:,}"
  yield "batch size", f"{of_run.batch_size:,}"
  optimizer = of_run.optimizer
  yield "optimizer", f"{_code(optimizer.name)}, learning rate {optimizer.learning_rate}"
  yield "EMA decay of the parameters", str(of_run.sampled_decay)
  yield "seed", str(of_run.seed)
  init = settings.init
  if init.path is None:
    yield "initialised from", "random weights"
    return
  text = _code(init.path)
  text += "" if init.step is None else f", step {init.step:,}"
  text += "" if init.checksum is None else f" (CRC-32 {_code(init.checksum)})"
  yield "initialised from", text


def _network(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
  model: Any = checkpoint.experiment.model
  leaves = flatten(checkpoint.params).values()
  yield "network", str(model.variant)
  yield "parameters", f"{sum(leaf.size for leaf in leaves):,}"
  yield "depth x width", f"{model.depth} x {model.hidden_size}"
  yield "heads", str(model.num_heads)
  yield "patch size", str(model.patch_size)
  if model.variant == "MaskDiT":
    width, heads = model.decoder_hidden_size, model.decoder_num_heads
    yield "decoder, depth x width", f"{model.decode_depth} x {width}"
    yield "decoder, heads", str(heads)
  elif model.takes_mask:
    yield "blocks after the side-interpolater", str(model.decode_depth)
  if (route := getattr(model, "route", None)) is not None:
    yield "blocks of the route", f"{route.start} to {route.stop - 1}"
  if model.drops_path:
    yield "blocks before the middle blocks", str(model.encoder_depth)
    yield "blocks after the middle blocks", str(model.decode_depth)
  if model.variant == "MicroDiT":
    size = f"{model.mixer_depth} x {model.mixer_width}"
    yield "depth x width of the mixer", f"{size}, {model.mixer_heads} heads"
  yield "input", "x".join(map(str, model.input_shape))
  if model.conditioning.label is not None:
    yield "classes", f"{model.num_classes:,}"
  if arrays := _arrays(checkpoint):
    yield "arrays of the condition", ", ".join(arrays)
  yield "label dropout", str(model.label_dropout)


def _sampling(settings: Settings) -> Iterator[tuple[str, str]]:
  diffusion, sampling = settings.diffusion, settings.sampling
  names = ["process"]
  if diffusion.process == "gaussian":
    names += ["schedule", "num_timesteps", "prediction", "variance", "loss_weight"]
  else:
    names.append("arguments")
  for name in names:
    yield f"`config.diffusion.{name}`", _code(str(getattr(diffusion, name)))
  for name, value in dataclasses.asdict(sampling).items():
    if name != "ema_decay":  # a row of the training
      yield f"`config.sampling.{name}`", _code(str(value))


def _scores(checkpoint: Checkpoint, workdir: AnyPath) -> Iterator[tuple[str, str]]:
  """Rows of the scores of the parameters, as far as the run has them."""
  settings, step = checkpoint.experiment.settings, checkpoint.step
  # Training scores the average of config.sampling.ema_decay of the run, else the first.
  saved = _read(workdir / "config.json").get("sampling")
  decay = saved.get("ema_decay") if isinstance(saved, dict) else None
  if (settings.ema_decays[0] if decay is None else decay) == settings.sampled_decay:
    found = _read(workdir / "scores" / f"step_{step:07d}.json")
    for name, value in _numbers(found):
      if name.startswith("eval/"):
        yield name.removeprefix("eval/"), f"{value:.4f}, in training"
  of_parameters = {"step": step, "ema_decay": settings.sampled_decay}
  found = _read(workdir / "evaluation" / "scores.json")
  sampling = found.get("sampling")  # null if the images come from a file
  if isinstance(sampling, dict) and of_parameters == {
    "step": found.get("step"),
    "ema_decay": sampling.get("ema_decay"),
  }:
    how = (
      f"{found.get('images')} images, {sampling.get('method')}, "
      f"{sampling.get('num_steps')} steps, cfg_scale {sampling.get('cfg_scale')}"
    )
    for name, value in _numbers(found.get("scores")):
      yield name, f"{value:.4f} ({_text(how)})"
  found = _read(workdir / "evaluation" / "bpd.json")
  bits = dict(_numbers(found)).get("total_bpd")
  if bits is not None and all(found.get(n) == v for n, v in of_parameters.items()):
    kind = "held-out" if found.get("held_out") is True else "training"
    how = f"{found.get('images')} {kind} images"
    yield "bits per dimension", f"{bits:.4f} ({_text(how)})"


def _read(path: AnyPath) -> dict[str, Any]:
  """Reads a JSON dict of a run; empty if there is none, or it is damaged."""
  try:
    return read_json(path, ValueError)
  except (FileNotFoundError, ValueError):
    return {}


def _numbers(found: Any) -> list[tuple[str, float]]:
  """The numbers in a dict, by name."""
  items = found.items() if isinstance(found, dict) else ()
  return [(_text(name), value) for name, value in items if type(value) in (int, float)]


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
  """A section with a table of two columns; empty without rows."""
  lines = [f"| {name} | {value} |" for name, value in rows]
  return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines]) if lines else ""


def _code(text: str) -> str:
  """A text in the type of code, in one line, that ends no cell of a table."""
  return f"`{_text(text).replace('`', chr(39))}`"


def _text(text: str) -> str:
  """A text in one line that ends no cell of a table."""
  return one_line(printable(text)).replace("|", "/")
