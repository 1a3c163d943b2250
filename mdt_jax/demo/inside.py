"""Looks inside a network: its masked pass, and the attention of its blocks.

The masked pass of an MDT: the encoder sees the kept tokens, the side-interpolater
predicts the removed tokens, and the decoder sees all tokens (arXiv 2303.14389).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from mdt_jax.data.transforms import to_float
from mdt_jax.demo.engine import Engine
from mdt_jax.diffusion.continuous import ContinuousProcess
from mdt_jax.errors import check_range
from mdt_jax.models.blocks import FinalLayer
from mdt_jax.models.masking import TokenMask
from mdt_jax.models.mdt import MDT
from mdt_jax.models.registry import Model
from mdt_jax.sampling.stepwise import Recent
from mdt_jax.types import Array, Params

MAX_MASKED = 0.95  # largest share of masked tokens
CACHED = 16  # views that stay in memory, for the clicks on their tokens
# Stack of blocks -> name in captions, in the order in which a network calls them.
STACKS = {
  "mixer_blocks": "mixer",
  "encoder_blocks": "encoder",
  "in_blocks": "in",
  "middle_blocks": "middle",
  "out_blocks": "out",
  "blocks": "block",
  "side_block": "side",
  "decode_blocks": "decode",
}


@dataclasses.dataclass(frozen=True)
class Question:
  """What to look at.

  Attributes:
    picture: bytes of the picture (H, W, C) uint8.
    shape: (H, W, C).
    label: class; None for no class.
    masked: share of masked tokens, in [0, MAX_MASKED].
    noise: share of the process, in [0, 1] from the picture to noise.
    seed: seed of the noise and of the mask.
  """

  picture: bytes
  shape: tuple[int, int, int]
  label: int | None
  masked: float
  noise: float
  seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
  """The attention of one block.

  Attributes:
    name: name of the block, such as "decode 2".
    ids: (K,) numbers of the tokens that the block sees.
    weights: (K, K) mean over the heads; row q holds the weights of query ids[q].
  """

  name: str
  ids: Int[np.ndarray, "K"]
  weights: Float[np.ndarray, "K K"]

  def of_token(self, token: int) -> Float[np.ndarray, "K"] | None:
    """Returns the weights of a token (K,); None if the block does not see it."""
    found = np.flatnonzero(self.ids == token)
    return self.weights[found[0]] if len(found) else None


@dataclasses.dataclass(frozen=True, eq=False)
class View:
  """What the network sees and predicts.

  Attributes:
    noisy: (H, W, C) the picture with noise, the network's input.
    removed: (h, w) bool, True for a removed token.
    side: (H, W, C) what the output layer reads from the tokens right after the
      side-interpolater; None without a mask or a side-interpolater.
    tokens: (h, w, 3) these tokens in false colours, their first three principal
      components; None as `side`.
    seen: (h, w, 3) the same tokens where the encoder sees all tokens, in the same
      colours. None as `side`.
    masked: (H, W, C) the prediction from the kept tokens; None without a mask.
    unmasked: (H, W, C) the prediction from all tokens.
    attention: the blocks, in the order of the network.
    note: what the network cannot show, and why; "" if it shows everything.
  """

  noisy: UInt8[np.ndarray, "H W C"]
  removed: Bool[np.ndarray, "h w"]
  side: UInt8[np.ndarray, "H W C"] | None
  tokens: UInt8[np.ndarray, "h w 3"] | None
  seen: UInt8[np.ndarray, "h w 3"] | None
  masked: UInt8[np.ndarray, "H W C"] | None
  unmasked: UInt8[np.ndarray, "H W C"]
  attention: tuple[Attention, ...]
  note: str


class SideSowing(MDT, kw_only=True):
  """An MDT that sows what the side-interpolater returns, and the conditioning."""

  def _interpolate(
    self, tokens: Array, c: Array, index: Array, token_mask: TokenMask | None
  ) -> Array:
    tokens = super()._interpolate(tokens, c, index, token_mask)
    self.sow("intermediates", "side_tokens", tokens)  # (B, L, D)
    self.sow("intermediates", "conditioning", c)  # (B, D)
    return tokens


class Viewer:
  """Answers questions about one network; answers are cached.

  Args:
    engine: draws with the network.
  """

  def __init__(self, engine: Engine):
    self._engine = engine
    self._views: Recent[View] = Recent(CACHED)
    self._programs: Recent[Callable[..., Any]] = Recent()
    self._turn = threading.Lock()

  @property
  def takes_mask(self) -> bool:
    """Whether the network can run on a part of the tokens."""
    model = self._engine.pipeline.model
    return model.takes_mask or model.has_route or model.defers_mask

  @property
  def has_side(self) -> bool:
    """Whether the network has a side-interpolater."""
    return _has_side(self._engine.pipeline.model)

  @property
  def grid(self) -> tuple[int, int]:
    """(rows, columns) of the tokens."""
    model = self._engine.pipeline.model
    height, width, _ = model.input_shape
    return height // model.patch_size, width // model.patch_size

  def default_ratio(self) -> float:
    """The share of tokens that the run masks; 0 for a network without masks."""
    if not self.takes_mask:
      return 0.0
    objective = self._engine.pipeline.experiment.settings
    return min(round(objective.masking.ratio * 20) / 20, MAX_MASKED)

  def look(self, question: Question) -> View:
    """Runs the network once with and once without the mask.

    Raises:
      SettingError: a value is out of range.
    """
    check_range("masked", question.masked, 0, MAX_MASKED)
    check_range("noise", question.noise, 0, 1)
    check_range("seed", question.seed, 0, 2**32 - 1)
    with self._turn:
      return self._views.get(question, lambda: self._look(question))

  def _look(self, question: Question) -> View:
    engine, pipeline = self._engine, self._engine.pipeline
    model, process = pipeline.model, pipeline.experiment.process
    x0 = self._encode(question)
    key = jax.random.key(question.seed)
    t = _time_at(process, question.noise)
    noise = jax.random.normal(jax.random.fold_in(key, 0), x0.shape)
    x_t = process.q_sample(x0, t, noise)
    label = pipeline.model.num_classes if question.label is None else question.label
    num_keep = max(model.num_kept(question.masked), 1)
    mask = None
    if self.takes_mask and num_keep < model.num_tokens:
      uniform = jax.random.uniform(jax.random.fold_in(key, 1), (1, model.num_tokens))
      mask = model.token_mask(uniform, num_keep)
    params = engine.stepper.place(pipeline.params)
    run = self._program(model)
    arguments = params, x_t, t, jnp.asarray([label], jnp.int32)
    whole, sown, encoded = run(*arguments, None)
    ids = np.arange(model.num_tokens)
    attention = list(_attention(sown, ids, ids))
    masked = side = tokens = seen = None
    removed = np.zeros(self.grid, bool)
    missing = []
    if mask is not None:
      masked, sown, after = run(*arguments, mask)
      kept = np.asarray(mask.ids_keep[0])
      found = list(_attention(sown, ids, kept))
      if found:
        attention = found
      else:
        missing.append("The attention is that of the pass over all tokens.")
      removed = np.asarray(mask.removed[0]).reshape(self.grid)
      if _has_side(model):
        side = after["x0"]
        both = np.stack([after["tokens"][0], encoded["tokens"][0]])
        tokens, seen = _in_colours(both, self.grid)
    missing += self._missing(model, attention)
    return View(
      noisy=self._show(x_t),
      removed=removed,
      side=None if side is None else self._show(side),
      tokens=tokens,
      seen=seen,
      masked=None if masked is None else self._show(masked),
      unmasked=self._show(whole),
      attention=tuple(attention),
      note=" ".join(missing),
    )

  def _missing(self, model: Model, attention: list[Attention]) -> list[str]:
    """Sentences about what the network cannot show."""
    name = getattr(model, "variant", type(model).__name__)
    texts = []
    if not self.takes_mask:
      texts.append(
        f"{name} has no masked pass: it always sees all tokens, so there are no kept "
        "tokens and no side-interpolater to show."
      )
    elif not _has_side(model):
      texts.append(f"{name} has no side-interpolater: {_why(model)}.")
    if not attention:
      texts.append(f"{name} does not store its attention weights.")
    return texts

  def _encode(self, question: Question) -> Array:
    """The network's input for the picture of a question, (1, H, W, C)."""
    pixels = np.frombuffer(question.picture, np.uint8).reshape(question.shape)
    autoencoder = self._engine.pipeline.autoencoder
    if autoencoder is None:
      return jnp.asarray(to_float(pixels)[None])
    return jnp.asarray(autoencoder.moments(pixels[None])[:, 0])

  def _show(self, latents: Array) -> UInt8[np.ndarray, "H W C"]:
    return self._engine.show(latents)[0]

  def _program(self, model: Model) -> Callable[..., Any]:
    """Compiles the network.

    Returns:
      (params, x_t, t, y, mask) -> (x0, attention of each stack of blocks, {"tokens":
      the tokens after the side-interpolater, "x0": what the output layer reads from
      them}, empty without a side-interpolater).
    """
    process = self._engine.pipeline.experiment.process
    sowing = cast(Model, _sowing(model))

    @jax.jit
    def run(
      params: Params, x_t: Array, t: Array, y: Array, mask: TokenMask | None
    ) -> Any:
      variables, time = {"params": params}, process.network_time(t)
      output, state = cast(
        Any, sowing.apply(variables, x_t, time, y, mask, mutable=["intermediates"])
      )
      sown = state.get("intermediates", {})
      side = {}
      if _has_side(model):
        tokens, c = sown["side_tokens"][0], sown["conditioning"][0]
        read = _read_output(cast(MDT, model), params, tokens, c)
        side = {"tokens": tokens, "x0": process.to_x0(read, x_t, t)}
      x0 = process.to_x0(output.astype(jnp.float32), x_t, t)
      return x0, _attention_of_tree(sown), side

    return self._programs.get("run", lambda: run)


def _read_output(model: MDT, params: Params, tokens: Array, c: Array) -> Array:
  """What the output layer reads from tokens (B, L, D): (B, H, W, channels)."""
  layer = FinalLayer(
    model.patch_size, model.last_channels, model.grid_size, dtype=model.dtype
  )
  output = layer.apply({"params": params["final_layer"]}, tokens, c)
  return cast(Array, output).astype(jnp.float32)


def _in_colours(
  tokens: Float[np.ndarray, "N L D"], grid: tuple[int, int]
) -> UInt8[np.ndarray, "N h w 3"]:
  """Colours tokens by the first three principal components of all of them."""
  rows = np.asarray(tokens, np.float32).reshape(-1, tokens.shape[-1])
  rows = rows - rows.mean(axis=0)
  _, _, axes = np.linalg.svd(rows, full_matrices=False)
  parts = rows @ axes[:3].T
  parts = np.pad(parts, ((0, 0), (0, 3 - parts.shape[1])))
  low, high = parts.min(axis=0), parts.max(axis=0)
  levels = 255 * (parts - low) / np.maximum(high - low, 1e-12)
  return levels.round().astype(np.uint8).reshape(len(tokens), *grid, 3)


def _has_side(model: Model) -> bool:
  """Whether the network is an MDT with a side-interpolater."""
  return type(model) is MDT and model.takes_mask


def _why(model: Model) -> str:
  """What predicts the removed tokens of a network without a side-interpolater."""
  if model.has_route:
    return "the removed tokens skip the middle blocks"
  if model.takes_mask:
    return "its decoder predicts the removed tokens"
  return "nothing predicts the removed tokens, so they stay empty"


def _sowing(model: Model) -> Any:
  """The network, with stored attention weights if it can store them."""
  fields = {field.name for field in dataclasses.fields(cast(Any, model))}
  if _has_side(model):
    own = fields - {"parent", "name", "sow_attention"}
    shared = {name: getattr(model, name) for name in own - {"unroll"}}
    return SideSowing(**shared, unroll=1, sow_attention=True)  # compiles fast
  sows = {"sow_attention": True} if "sow_attention" in fields else {}
  return model.clone(unroll=1, **cast(Any, sows))


def _time_at(process: Any, share: float) -> Array:
  """The time (1,) of the process at a share of it; the picture is almost clean at 0."""
  if isinstance(process, ContinuousProcess):
    low, high = process.start_time, process.end_time
    margin = 1e-3 * (high - low)  # the levels at the ends may be infinite
    return jnp.asarray([np.clip(low + share * (high - low), low, high - margin)])
  return jnp.asarray([round(share * (process.end_time - 1))], jnp.int32)


def _attention_of_tree(tree: Any) -> dict[str, Array]:
  """Stack of blocks -> attention weights (blocks, K, K), the mean over the heads."""
  found: dict[str, Array] = {}

  def visit(node: Any, path: tuple[str, ...]) -> None:
    for name, value in node.items():
      if name == "attention_weights":
        weights = value[0]  # ([blocks], 1, heads, K, K)
        means = weights.mean(axis=-3)
        found[path[0]] = means.reshape(-1, *means.shape[-2:])
      elif isinstance(value, dict):
        visit(value, (*path, name))

  visit(tree, ())
  return found


def _attention(
  sown: dict[str, Array], whole: Int[np.ndarray, "L"], kept: Int[np.ndarray, "K"]
) -> Iterator[Attention]:
  """Yields the attention of each block, in the order of the network."""
  places = list(STACKS)
  known = [name for name in sown if name in STACKS]
  for name in sorted(known, key=places.index):
    weights = np.asarray(sown[name])
    ids = whole if weights.shape[-1] == len(whole) else kept
    for i, block in enumerate(weights):
      number = f" {i + 1}" if len(weights) > 1 else ""
      yield Attention(f"{STACKS[name]}{number}", ids, block)
