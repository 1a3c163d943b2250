"""Which parameters of a network a run trains, and with which learning rates.

Patterns are regular expressions, searched for in the path of a parameter, such as
"decode_blocks/attention/qkv/kernel". The blocks of a stack share one path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any

import jax
import optax

from mdt_jax.errors import SettingError
from mdt_jax.types import Params

# Names for patterns of frozen parameters.
PRESETS = {
  # All but the labels and what the condition modulates (adaLN).
  "few_shot": r"^(?!label_embed/)(?!(.*/)?modulation/)",
  # DiffFit (arXiv 2304.06648): all but biases and labels. The released networks have no
  # parameters in their LayerNorms, and DiffFit's scale factors are not part of them.
  "difffit": r"^(?!label_embed/)(?!.*/bias$)",
}
_SEPARATOR = ":"


def frozen_paths(
  setting: str,
  patterns: Iterable[str],
  paths: Collection[str],
  always: Collection[str] = (),
) -> frozenset[str]:
  """Returns the paths of the parameters that are not trained.

  Args:
    setting: name of the setting in errors.
    patterns: regular expressions, or names in PRESETS.
    paths: paths of all parameters.
    always: paths, or names of top-level parameters, that no run trains.

  Raises:
    SettingError: a pattern is no regular expression or matches no parameter, or
      patterns would freeze all parameters.
  """
  patterns = tuple(patterns)
  found = {path for path in paths if is_frozen(path, always)}
  for pattern in patterns:
    matched = _matches(setting, PRESETS.get(pattern, pattern), pattern, paths)
    if not matched:
      text = f"matches no parameter, such as {_some(paths)}; presets are "
      raise SettingError(setting, pattern, text + ", ".join(PRESETS))
    found |= matched
  if patterns and found == set(paths):
    raise SettingError(setting, ",".join(patterns), "would freeze every parameter")
  return frozenset(found)


def rates_of_paths(
  setting: str, items: Iterable[str], paths: Collection[str]
) -> dict[str, float]:
  """Returns path -> learning rate, for the parameters that items name.

  Args:
    setting: name of the setting in errors.
    items: texts PATTERN:RATE; the first pattern that matches a path decides.
    paths: paths of the trained parameters.

  Raises:
    SettingError: an item has another form, a rate is not above 0, or a pattern is no
      regular expression or matches no trained parameter.
  """
  found: dict[str, float] = {}
  for item in items:
    pattern, _, text = str(item).rpartition(_SEPARATOR)
    try:
      rate = float(text)
    except ValueError:
      rate = 0.0
    if not pattern or not 0 < rate < float("inf"):
      raise SettingError(setting, item, "must be PATTERN:RATE with a rate above 0")
    matched = _matches(setting, pattern, item, paths)
    if not matched:
      text = f"matches no parameter that is trained, such as {_some(paths)}"
      raise SettingError(setting, item, text)
    for path in matched:
      found.setdefault(path, rate)
  return found


def _some(paths: Collection[str]) -> str:
  """The first paths, for errors."""
  return ", ".join(sorted(paths)[:3])


def _matches(
  setting: str, pattern: str, shown: str, paths: Collection[str]
) -> set[str]:
  """The paths in which a pattern is found; raises SettingError for an invalid one."""
  try:
    compiled = re.compile(pattern)
  except (re.error, TypeError, RecursionError, OverflowError) as error:
    raise SettingError(
      setting, shown, f"must be a regular expression: {error}"
    ) from None
  return {path for path in paths if compiled.search(path)}


def without_frozen(
  optimizer: optax.GradientTransformation, frozen: Collection[str]
) -> optax.GradientTransformation:
  """Wraps an optimizer so that the parameters `frozen` are not updated.

  Args:
    optimizer: the optimizer of the other parameters. It has no state for `frozen`.
    frozen: paths of parameters, or names of top-level parameters.
  """
  if not frozen:
    return optimizer
  transforms: dict[Hashable, optax.GradientTransformation]
  transforms = {"trained": optimizer, "frozen": optax.set_to_zero()}
  return _by_path(
    transforms, lambda path: "frozen" if is_frozen(path, frozen) else "trained"
  )


def with_rates(
  create: Callable[[float], optax.GradientTransformation],
  rates: Mapping[str, float],
  learning_rate: float,
) -> optax.GradientTransformation:
  """An optimizer in which some parameters have learning rates of their own.

  Args:
    create: factor of the learning rate -> optimizer.
    rates: path of a parameter -> its largest learning rate.
    learning_rate: largest learning rate of the others.
  """
  if not rates:
    return create(1.0)
  factors = {rate: rate / learning_rate for rate in rates.values()}
  transforms: dict[Hashable, optax.GradientTransformation] = {
    repr(rate): create(factor) for rate, factor in factors.items()
  }
  transforms["others"] = create(1.0)
  return _by_path(
    transforms, lambda path: repr(rates[path]) if path in rates else "others"
  )


def is_frozen(path: str, frozen: Collection[str]) -> bool:
  """Whether `frozen` holds the path of a parameter or its top-level name."""
  return path in frozen or path.partition("/")[0] in frozen


def _by_path(
  transforms: Mapping[Hashable, optax.GradientTransformation],
  label: Callable[[str], str],
) -> optax.GradientTransformation:
  """Applies to each parameter the transformation of the label of its path."""

  def labels(params: Params) -> Params:
    def of_leaf(path: Any, leaf: Any) -> str:
      del leaf
      return label(jax.tree_util.keystr(path, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(of_leaf, params)

  return optax.partition(transforms, labels)
