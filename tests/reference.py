"""Recorded outputs of the released PyTorch code, and comparisons with them."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdt_jax.models.mdt import MDT
from mdt_jax.models.registry import abstract_params
from mdt_jax.pretrained.torch_mdt import from_torch

FIXTURES = Path(__file__).parent / "fixtures"

# Relative to the largest magnitude, in float32 on a CPU.
FORWARD_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
LOOP_TOLERANCE = 1e-4

# Row of docs/parity.md -> (largest difference seen, tolerance). The tests fill it.
# `python -m benchmarks.parity` writes the table from it.
MEASURED: dict[str, tuple[float, float]] = {}

NAMES = {"mdt_v1": "MDT v1", "mdt_v2": "MDTv2", "dit": "DiT", "sit": "SiT"}
MDT_FIXTURES = ("mdt_v1", "mdt_v2")
MODEL_FIXTURES = (*MDT_FIXTURES, "dit")


@functools.cache
def load(name: str) -> Mapping[str, np.ndarray]:
  """Arrays of NAME.npz as recorded, images as NCHW."""
  with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as data:
    return {key: data[key] for key in data.files}


@functools.cache
def load_model(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """(config, params) of NAME.pt."""
  heads = json.loads(str(load(name)["config"]))["num_heads"]
  return from_torch(FIXTURES / f"{name}.pt", num_heads=heads)


def make_model(name: str, **overrides: Any) -> MDT:
  return MDT(**{**load_model(name)[0], **overrides})


def random_params(model: MDT, seed: int = 0) -> dict[str, Any]:
  """Random parameters. A new model has zeros, with which its output is zero.

  NumPy draws them, as JAX needs seconds to compile the initialization of each model.
  """
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32),
    abstract_params(model),
  )


def to_nhwc(array: np.ndarray) -> np.ndarray:
  return np.moveaxis(array, -3, -1)


def to_nchw(array: Any) -> np.ndarray:
  return np.moveaxis(np.asarray(array), -1, -3)


def assert_matches(
  what: str,
  actual: Any,
  expected: np.ndarray,
  tolerance: float,
  *,
  each: bool = False,
) -> None:
  """Asserts that the error of `actual` is at most `tolerance`, and records the error.

  Args:
    what: the row of docs/parity.md. It shows the largest error with this name.
    actual: computed here.
    expected: recorded from the released code.
    tolerance: relative to the largest expected magnitude, or to each value.
    each: whether the error of each value is relative to its own magnitude.
  """
  if each:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    # An expected zero has an absolute tolerance.
    scale = np.where(expected == 0, 1, np.abs(expected))
    error = float((np.abs(actual - expected) / scale).max())
  else:
    error = relative_error(actual, expected)
  MEASURED[what] = (max(error, MEASURED.get(what, (0.0, 0.0))[0]), tolerance)
  assert error <= tolerance, f"{what}: {error:.2g} where {tolerance:g} is allowed"


def relative_error(actual: Any, expected: np.ndarray) -> float:
  """Largest difference divided by the largest expected magnitude."""
  actual = np.asarray(actual)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  return float(np.abs(actual - expected).max() / np.abs(expected).max())


@functools.cache
def inception_tensors() -> dict[str, np.ndarray]:
  """The random weights of the recording inception.npz, by names of pytorch-fid."""
  shapes = json.loads((FIXTURES / "inception_params.json").read_text())
  seed = int(load("inception")["seed"])
  return {name: _inception_tensor(name, shape, seed) for name, shape in shapes.items()}


def _inception_tensor(name: str, shape: list[int], seed: int) -> np.ndarray:
  rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
  if name.endswith("running_var"):
    tensor = rng.uniform(0.5, 1.5, shape)
  elif name.endswith("bn.weight"):
    tensor = rng.uniform(0.8, 1.2, shape)
  elif len(shape) > 1:
    tensor = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
  else:
    tensor = 0.1 * rng.standard_normal(shape)
  return tensor.astype(np.float32)
