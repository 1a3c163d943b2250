"""Fits the parameters of a trained network to another network.

`Adaptation` decides for each parameter of the new network how it starts: kept, resized,
with new values, or neutral, which means that the new network computes what the old one
did. It refuses what cannot be fitted. Nothing is read until `Adaptation.start`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mdt_jax.errors import SettingError
from mdt_jax.models.mdt import MDT, UNUSED_BIAS_ROWS
from mdt_jax.models.registry import Model, abstract_params
from mdt_jax.pretrained.adaptation_rules import (
  blocks_in_order,
  family_of,
  find_misfit,
)
from mdt_jax.pretrained.parameter_starts import (
  KEPT,
  NEUTRAL,
  NEW,
  RESIZED,
  Read,
  Start,
  neutral_layer,
  start_anew,
)
from mdt_jax.pretrained.resampling import (
  resize_bias_table,
  resize_last_layer,
  resize_patch_embedding,
  resize_positions,
)
from mdt_jax.pretrained.tensors import MAX_NAMES, flatten

PATCHES = ("resize", "fresh")


class Adaptation:
  """The start of each parameter of a network from those of another network.

  Networks of the same class with parameters of equal shapes fit. Networks DiT, SiT,
  TREAD, MDT, MDTv2, MaskDiT, MicroDiT and SPRINT may differ in classes, input size,
  patch size, channels and learned variance, and, where `adaptation_rules` says so, in
  the variant. A part of the condition that the old network lacks changes nothing at
  first; a vector or tokens that replace labels start as the null label.

  Args:
    source: the old network.
    target: the new network.
    classes: new label -> old label; None: the same labels if the numbers of classes are
      equal, and otherwise new rows for all labels but the null label.
    patches: "resize" or "fresh": patch embedding and last layer of another patch size.
    partial: whether to keep a part of the old network: the depths may differ, and the
      variants be any but MaskDiT and SPRINT. Blocks that the old network lacks start
      with new values, which change nothing at first.
    name: where the old network comes from, for errors.

  Attributes:
    starts: path of a parameter of the new network -> how it starts.
    dropped: paths of the parameters of the old network that are not used. A parameter
      that starts with new values is not listed a second time.

  Raises:
    SettingError: setting "path", of the value `name`: the networks do not fit.
  """

  def __init__(
    self,
    source: Model,
    target: Model,
    *,
    classes: Mapping[int, int] | None = None,
    patches: str = "resize",
    partial: bool = False,
    name: str = "the network",
  ):
    self.source, self.target = source, target
    self._name = name
    self._classes, self._patches = classes, patches
    self._old = {p: tuple(a.shape) for p, a in flatten(abstract_params(source)).items()}
    self._new = {p: tuple(a.shape) for p, a in flatten(abstract_params(target)).items()}
    self._used: set[str] = set()
    # Stack of the old network -> number of its last blocks that the new one lacks.
    self._dropped_layers = collections.Counter[str]()
    if isinstance(source, MDT) and isinstance(target, MDT):
      misfit = find_misfit(source, target, partial)
      if misfit is not None:
        raise self._misfit(*misfit)
      old, new = self._layers = blocks_in_order(source), blocks_in_order(target)
      self._dropped_layers.update(stack for stack, _ in old[len(new) :])
      make = self._start_of
    else:
      make = self._same
    self.starts = {path: make(path) for path in self._new}
    new_values = {path for path, start in self.starts.items() if start.how == NEW}
    self.dropped = sorted(self._old.keys() - self._used - new_values)
    self._check_shapes()

  def start(self, path: str, read: Read, new: np.ndarray | None) -> np.ndarray:
    """Computes the parameter `path`; `new` as `Start.compute` needs it."""
    value = self.starts[path].compute(read, new)
    assert value.shape == self._new[path], (path, value.shape, self._new[path])
    return value

  def describe(self) -> list[tuple[str, str, str]]:
    """Returns (parameter, shape, how it starts), also for dropped parameters."""
    rows = []
    for path, start in self.starts.items():
      old = self._old.get(path)
      shape = f"{self._new[path]}"
      if old is not None and old != self._new[path]:
        shape = f"{old} -> {shape}"
      rows.append((path, shape, start.note or start.how))
    rows += [(path, f"{self._old[path]}", "dropped") for path in self.dropped]
    for path in sorted(self._used):
      if count := self._dropped_layers[path.partition("/")[0]]:
        shape = self._old[path]
        what = f"dropped: the last {count} of {shape[0]} blocks"
        rows.append((path, f"{shape}", what))
    return rows

  # Checks.

  def _misfit(self, what: str, more: str = "") -> SettingError:
    """Returns the error for networks that do not fit."""
    return SettingError("path", self._name, f"does not fit: {what} here{more}")

  def _check_shapes(self) -> None:
    """Raises SettingError if a kept parameter has another shape, or none is kept."""
    problems = [
      f"{path} is {self._old.get(path, 'missing')} there and {self._new[path]}"
      for path, start in self.starts.items()
      if start.how == KEPT and not start.note and self._old.get(path) != self._new[path]
    ]
    if not isinstance(self.target, MDT):
      problems += [
        f"{path} is {self._old[path]} there and missing" for path in self.dropped
      ]
    if not problems:
      return
    more = len(problems) - MAX_NAMES
    named = "; ".join(problems[:MAX_NAMES])
    raise self._misfit(named, f"; and {more} more" if more > 0 else "")

  # The start of each parameter.

  def _same(self, path: str) -> Start:
    """Keeps a parameter as it is."""
    self._used.add(path)
    return Start(KEPT, lambda read, new: read(path))

  def _start_of(self, path: str) -> Start:
    """Returns the start of a parameter of `MDT` or of a subclass."""
    if path in _SPECIAL:
      return _SPECIAL[path](self, path)
    stack, _, inside = path.partition("/")
    if stack in _STACKS:
      return self._block(path, stack, inside)
    if path in self._old:
      if path.endswith("relative_position_bias"):  # that of the side-interpolater
        return self._bias_table(path)
      return self._same(path)
    assert isinstance(self.target, MDT)
    if path.startswith(("vector_embed/", "tokens_embed/")):
      return self._condition(path)
    return start_anew(f"of {family_of(self.target).own_part}")

  def _block(self, path: str, stack: str, inside: str) -> Start:
    """Starts a parameter of a stack of blocks, layer by layer."""
    layers_of_old, layers_of_new = self._layers
    ids = [i for i, (name, _) in enumerate(layers_of_new) if name == stack]
    places = [layers_of_old[i] if i < len(layers_of_old) else None for i in ids]
    places = [p if p and f"{p[0]}/{inside}" in self._old else None for p in places]
    names = sorted({f"{place[0]}/{inside}" for place in places if place})
    self._used |= set(names)
    if names == [path] and self._old[path][0] == len(places):
      whole = inside == "attention/relative_position_bias"
      return self._bias_table(path) if whole else self._same(path)
    shape = self._new[path]
    neutral = neutral_layer(inside, shape[1:])
    needs_new = neutral is None and None in places
    resize = self._bias_resizer if inside.endswith("relative_position_bias") else None

    def compute(read: Read, new: np.ndarray | None) -> np.ndarray:
      stacks = {name: read(name) for name in names}
      layers = []
      for index, place in enumerate(places):
        if place is not None:
          layer = stacks[f"{place[0]}/{inside}"][place[1]]
          layer = layer if resize is None else resize(layer)
        elif neutral is not None:
          layer = neutral
        else:
          assert new is not None
          layer = new[index]
        layers.append(layer)
      return np.stack(layers).astype(np.float32)

    wrong = [
      name for name in names if resize is None and self._old[name][1:] != shape[1:]
    ]
    if wrong:
      raise self._misfit(f"{wrong[0]} is {self._old[wrong[0]]} there and {shape}")
    count = sum(place is None for place in places)
    if not names:
      if inside.startswith("cross_attention/"):
        return start_anew("of the condition tokens; they change nothing at first")
      if neutral is None:
        return start_anew("no such block there")
      return Start(NEUTRAL, compute, "neutral: not there")
    note = f"kept, from {' and '.join(names)}" if names != [path] else "kept"
    if count:
      note += f"; {count} of {len(places)} blocks start with "
      note += "new values" if neutral is None else "neutral ones"
    return Start(KEPT, compute, note, needs_new)

  @property
  def _grids(self) -> tuple[Any, Any]:
    """The grids of tokens of both networks."""
    source: Any = self.source
    target: Any = self.target
    return source.grid_size, target.grid_size

  def _bias_resizer(self, table: np.ndarray) -> np.ndarray:
    """Resizes the bias table of one block."""
    return resize_bias_table(table, *self._grids)

  def _bias_table(self, path: str) -> Start:
    """Keeps or resizes the bias tables of a stack of blocks, or of one block."""
    if self._grids[0] == self._grids[1]:
      return self._same(path)
    self._used.add(path)

    def compute(read: Read, new: np.ndarray | None) -> np.ndarray:
      del new
      tables = read(path)
      if tables.ndim == 2:
        return self._bias_resizer(tables)
      return np.stack([self._bias_resizer(table) for table in tables])

    note = f"resized bicubically; the {UNUSED_BIAS_ROWS} unused rows kept"
    return Start(RESIZED, compute, note)

  def _positions(self, path: str) -> Start:
    """Keeps or resizes positions; those that the old network lacks are zeros."""
    if path not in self._old:
      shape = self._new[path]
      zeros = lambda read, new: np.zeros(shape, np.float32)  # noqa: E731
      return Start(NEUTRAL, zeros, "neutral: zeros, not there")
    if self._grids[0] == self._grids[1]:
      return self._same(path)
    self._used.add(path)
    return Start(
      RESIZED,
      lambda read, new: resize_positions(read(path), *self._grids),
      "resized bicubically",
    )

  def _patch_embedding(self, path: str) -> Start:
    """Starts the patch embedding: its kernel (p p C, D), or its bias (D,).

    With a bottleneck of width R, its kernels are (p p C, R) and (R, D).
    """
    source: Any = self.source
    target: Any = self.target
    old, new, channels = source.patch_size, target.patch_size, target.in_channels
    there, here = source.patch_bottleneck, target.patch_bottleneck
    if there != here:
      return start_anew(f"patch_bottleneck is {there} there, {here} here")
    if (old, source.in_channels) == (new, channels):
      return self._same(path)
    if source.in_channels != channels:
      return start_anew(f"{source.in_channels} channels there, {channels} here")
    if self._patches == "fresh":
      return start_anew(f"patches of {old} pixels there, {new} here")
    if not path.endswith("bottleneck/kernel" if here else "linear/kernel"):
      return self._same(path)
    self._used.add(path)

    def compute(read: Read, _: np.ndarray | None) -> np.ndarray:
      kernel = read(path)
      width = kernel.shape[-1]
      kernel = kernel.reshape(old, old, channels, width)
      return resize_patch_embedding(kernel, new).reshape(-1, width)

    return Start(RESIZED, compute, "resized by the pseudo-inverse (FlexiViT)")

  def _last_layer(self, path: str) -> Start:
    """Starts the last linear layer: kernel (D, p p C), or bias (p p C,)."""
    source: Any = self.source
    target: Any = self.target
    old, new, channels = source.patch_size, target.patch_size, target.in_channels
    same_outputs = source.out_channels == target.out_channels
    same_layer = source.last_channels == target.last_channels
    if (old, source.in_channels) == (new, channels) and same_outputs and same_layer:
      return self._same(path)
    if source.in_channels != channels:
      return start_anew(f"{source.in_channels} channels there, {channels} here")
    if old != new and self._patches == "fresh":
      return start_anew(f"patches of {old} pixels there, {new} here")
    self._used.add(path)

    def compute(read: Read, _: np.ndarray | None) -> np.ndarray:
      # Channels that SiT ignores are left out, and start at 0.
      used = min(source.out_channels, target.out_channels)
      layer = resize_last_layer(read(path), old, new, source.last_channels, used)
      return resize_last_layer(layer, new, new, used, target.last_channels)

    notes = []
    if not same_outputs:
      notes.append(
        "kept without the variance"
        if source.learn_sigma
        else "kept; the outputs of the variance are 0"
      )
    elif not same_layer:
      notes.append("kept; the channels that SiT ignores are left out or 0")
    if old != new:
      notes.append("resized bicubically")
    return Start(KEPT if old == new else RESIZED, compute, "; ".join(notes))

  def _condition(self, path: str) -> Start:
    """Starts a parameter of a vector or of tokens that the old network lacks."""
    table = "label_embed/table"
    biases = ["tokens_embed/pool/bias"]
    if "vector_embed/fc2/bias" in self._new:
      biases = ["vector_embed/fc2/bias", "vector_embed/null"]
    replaces = table in self._old and table not in self._new
    if not (path in biases and replaces and _has_null_row(self.source)):
      return start_anew("of the condition, which changes nothing at first")
    self._used.add(table)
    note = f"the null label, the last row of {table}"
    return Start(NEUTRAL, lambda read, new: np.array(read(table)[-1]), note)

  def _labels(self, path: str) -> Start:
    """Starts the label table: (classes, D), and a last row for a learned null label."""
    source, target = self.source, self.target
    if path not in self._old:
      shape = self._new[path]
      zeros = lambda read, new: np.zeros(shape, np.float32)  # noqa: E731
      return Start(NEUTRAL, zeros, "neutral: zeros, no labels there")
    old, new = source.num_classes, target.num_classes
    old_null, new_null = _has_null_row(source), _has_null_row(target)
    keeps_null = old_null and new_null
    before = source.conditioning.label
    had_zero = before is not None and before.null == "zero"
    rows = self._classes  # new label -> old label
    if rows is None:
      rows = dict(zip(range(new), range(old), strict=True)) if old == new else {}
    if self._classes is None and old == new and old_null == new_null:
      return self._same(path)
    self._used.add(path)

    def compute(read: Read, values: np.ndarray | None) -> np.ndarray:
      table = read(path)
      assert values is not None
      found = np.array(values, np.float32)
      for label, old_label in rows.items():
        found[label] = table[old_label]
      if keeps_null:
        found[new] = table[old]
      elif had_zero and new_null:
        found[new] = 0
      return found

    note = f"{len(rows)} of {new} classes kept"
    if len(rows) < new:
      note += ", the others new"
    if new_null:
      start = "kept" if keeps_null else "0, as there" if had_zero else "new"
      note += f"; null label {start}"
    return Start(KEPT, compute, note, needs_new=True)


_STACKS = (
  "blocks",
  "in_blocks",
  "out_blocks",
  "encoder_blocks",
  "middle_blocks",
  "decode_blocks",
)
_SPECIAL: dict[str, Callable[[Adaptation, str], Start]] = {
  "label_embed/table": Adaptation._labels,
  "pos_embed": Adaptation._positions,
  "decode_pos_embed": Adaptation._positions,
  "patch_embed/bottleneck/kernel": Adaptation._patch_embedding,
  "patch_embed/linear/kernel": Adaptation._patch_embedding,
  "patch_embed/linear/bias": Adaptation._patch_embedding,
  "final_layer/linear/kernel": Adaptation._last_layer,
  "final_layer/linear/bias": Adaptation._last_layer,
}


def _has_null_row(model: Model) -> bool:
  """Whether the label table has a row for the null label."""
  label = model.conditioning.label
  return label is not None and label.null == "learned" and label.dropout > 0
