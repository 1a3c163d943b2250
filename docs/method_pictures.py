"""Draws which blocks of each network see which tokens: python docs/method_pictures.py

Writes docs/methods/NAME.svg for each method. --check compares the files instead. Each
picture comes from a run of the network on two images with the same token mask, and from
the gradient of the objective's loss:

- a column is a block, a row a token of the image;
- a cell is filled if the block receives the token; it is orange if the token has the
  same value for both images, so that it is a mask token;
- the last column is filled for tokens whose output the loss reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax import create_model, create_objective, create_process
from mdt_jax.models import layers
from mdt_jax.models.flops import forward_flops
from mdt_jax.objectives.objective import Objective

FOLDER = Path(__file__).parent / "methods"
SIZES: dict[str, Any] = dict(
  input_size=8, num_classes=10, hidden_size=48, num_heads=2, learn_sigma=False
)
# Name of the picture -> (network, its attributes, objective, its arguments). The
# decoder of MaskDiT is about as narrow beside 48 as the released one beside 1,152.
METHODS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
  "dit": ("DiT-S/2", {}, "plain", {}),
  "mdt": ("MDT-S/2", {}, "mdt", {"width": 0.0}),
  "mdtv2": ("MDTv2-S/2", {}, "mdt", {"width": 0.0}),
  "maskdit": (
    "MaskDiT-S/2",
    {"decoder_hidden_size": 24, "decoder_num_heads": 1},
    "maskdit",
    {},
  ),
  "microdit": ("MicroDiT-S/2", {}, "microdit", {}),
  "tread": ("TREAD-S/2", {}, "tread", {}),
  "sprint": ("SPRINT-S/2", {}, "sprint", {}),
}
CELL, ROW, LEFT, TOP = 20, 14, 96, 64  # pixels
SEEN, MASK_TOKEN, LOSS, LINE = "#3b6fb6", "#e8963a", "#4a9d6f", "#c8c8c8"


@dataclasses.dataclass
class Stack:
  """A stack of blocks that ran.

  Attributes:
    name: name of its module.
    length: number of blocks.
    tokens: indices of the tokens that it receives.
    values: (K, D) the tokens of the first image.
  """

  name: str
  length: int
  tokens: np.ndarray
  values: np.ndarray


class Recorder:
  """Wraps a stack of blocks, and records the tokens that it receives.

  Args:
    stack: the module, as `layers.stack` returns it.
    name, length: of the stack.
    calls: receives (name, length, tokens (B, K, D)) of each call.
  """

  def __init__(self, stack: Any, name: str, length: int, calls: list[Any]):
    self._stack, self._entry, self._calls = stack, (name, length), calls

  def __call__(self, tokens: jax.Array, *rest: Any) -> Any:
    self._calls.append((*self._entry, tokens))
    return self._stack(tokens, *rest)

  def apply(self, variables: Any, tokens: jax.Array, *rest: Any) -> Any:
    self._calls.append((*self._entry, tokens))
    return self._stack.apply(variables, tokens, *rest)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stack, name)


def run(objective: Objective, image: jax.Array, kept: int | None) -> list[Stack]:
  """Runs the network on an image with a mask, and returns its stacks in order."""
  model: Any = objective.model
  mask = None
  if kept is not None:
    noise = jax.random.uniform(jax.random.key(1), (1, model.num_tokens))
    mask = model.token_mask(noise, kept)
  t, y = jnp.array([0.5]), jnp.array([3])
  params = model.init(jax.random.key(0), image, t, y)
  # Parameters that start at zero would hide the image.
  waves = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
  params = jax.tree.map(lambda p, wave: p + 0.1 * wave, params, waves)
  names, calls = [], []
  build = layers.stack

  def record(block: Any, length: int, *, name: str, **attributes: Any) -> Recorder:
    stack = build(block, length, name=name, **attributes)
    return Recorder(stack, name, length, calls)

  def record_side_block(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if (context.module.name, context.method_name) == ("side_block", "__call__"):
      calls.append(("side_block", 1, args[0]))
    return call(*args, **kwargs)

  def apply() -> list[jax.Array]:
    calls.clear()
    with nn.intercept_methods(record_side_block):
      model.apply(params, image, t, y, *(() if mask is None else (mask,)))
    names[:] = [call[:2] for call in calls]
    return [call[2][0] for call in calls]

  with mock.patch.object(layers, "stack", record):
    inputs = jax.jit(apply)()
  every = np.arange(model.num_tokens)
  return [
    Stack(
      name,
      length,
      every if mask is None or len(tokens) > kept else np.asarray(mask.ids_keep[0]),
      np.asarray(tokens),
    )
    for (name, length), tokens in zip(names, inputs, strict=True)
  ]


def tokens_of_loss(objective: Objective, static: Any) -> np.ndarray:
  """Whether the loss reads the output at each token, for the mask of `run`: (L,)."""
  model: Any = objective.model
  batch = {"image": jax.random.normal(jax.random.key(2), (1, *model.input_shape))}
  draws = objective.draw(jax.random.key(3), {**batch, "label": jnp.array([3])})
  noise = jax.random.uniform(jax.random.key(1), (1, model.num_tokens))
  draws = draws.replace(mask_noise=noise)

  def loss(output: jax.Array) -> jax.Array:
    return objective.loss(lambda *_, **__: output, {}, draws, static)[0]

  gradient = jax.grad(loss)(jnp.ones((1, *model.input_shape)))
  patches = np.abs(gradient[0]).sum(-1).reshape(4, 2, 4, 2)
  return patches.sum((1, 3)).reshape(-1) > 0


def draw(name: str) -> str:
  """Returns the picture of a method as SVG."""
  network, attributes, objective_name, arguments = METHODS[name]
  model = create_model(network, **SIZES, **attributes)
  objective = create_objective(
    objective_name, model=model, process=create_process("flow"), **arguments
  )
  static = objective.static_choices[0]
  kept = static if isinstance(static, int) else None
  shape = (1, *model.input_shape)
  images = [jax.random.normal(jax.random.key(seed), shape) for seed in (0, 1)]
  stacks, others = (run(objective, image, kept) for image in images)
  cells, x, texts = [], LEFT, []
  for stack, other in zip(stacks, others, strict=True):
    is_same = (stack.values == other.values).all(axis=1)
    for block in range(stack.length):
      for token, same in zip(stack.tokens, is_same, strict=True):
        color = MASK_TOKEN if same and block == 0 else SEEN
        cells.append(_cell(x + block * CELL, TOP + token * ROW, color))
    middle = x + stack.length * CELL / 2
    label = stack.name.removesuffix("_block").removesuffix("_blocks")
    texts.append(_text(middle, TOP - 24, label, "middle"))
    texts.append(_text(middle, TOP - 9, f"{stack.length}", "middle"))
    x += stack.length * CELL + 16
  for token in np.flatnonzero(tokens_of_loss(objective, static)):
    cells.append(_cell(x, TOP + token * ROW, LOSS))
  texts.append(_text(x + CELL / 2, TOP - 9, "loss", "middle"))
  width, height = x + CELL + 24, TOP + model.num_tokens * ROW + 36
  for token in range(model.num_tokens + 1):
    y = TOP + token * ROW
    cells.insert(0, f'<path d="M{LEFT} {y}H{x + CELL}" stroke="{LINE}"/>')
  plain = forward_flops(create_model("DiT-S/2", **SIZES))
  share = forward_flops(model, kept) / plain
  removed = f"{kept} of {model.num_tokens} tokens kept" if kept else "all tokens"
  note = f"{removed}; the pass has {share:.2f} of DiT's FLOPs"
  texts.append(_text(LEFT, height - 12, note, "start"))
  texts.append(_text(12, TOP + 8 * ROW, "tokens", "start"))
  texts.append(_text(12, 20, network.partition("-")[0], "start", 15))
  body = "\n".join([*cells, *texts])
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>\n'
    f"{body}\n</svg>\n"
  )


def _cell(x: float, y: float, color: str) -> str:
  return (
    f'<rect x="{x + 1:g}" y="{y + 1:g}" width="{CELL - 2}" height="{ROW - 2}" '
    f'fill="{color}"/>'
  )


def _text(x: float, y: float, text: str, anchor: str, size: int = 11) -> str:
  return (
    f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{text}</text>'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--check", action="store_true")
  is_check = parser.parse_args().check
  FOLDER.mkdir(exist_ok=True)
  for name in METHODS:
    path, picture = FOLDER / f"{name}.svg", draw(name)
    if not is_check:
      path.write_text(picture)
    elif not path.exists() or path.read_text() != picture:
      sys.exit(f"{path.name} is not what its network does: run {sys.argv[0]}")


if __name__ == "__main__":
  main()
