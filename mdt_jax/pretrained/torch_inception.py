"""Reads and converts the weights of FID's Inception v3 (2015).

Three released files can be read:
- pytorch-fid's state dict, pt_inception-2015-12-05-6726825d.pth;
- torch-fidelity's state dict, weights-inception-2015-12-05-6726825d.pth;
- the frozen graph that both are derived from, classify_image_graph_def.pb of
  inception-2015-12-05.tgz.

`convert_inception` writes a .safetensors file with pytorch-fid's tensor names.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdt_jax.errors import SettingError, one_line, renamed_in_errors
from mdt_jax.models.inception import IMAGE_SIZE, NUM_CLASSES, Inception
from mdt_jax.paths import expand_home, output_file
from mdt_jax.pretrained.bucket_weights import local_weights
from mdt_jax.pretrained.tensors import (
  READABLE,
  Tensors,
  check_file,
  check_suffix,
  flatten,
  misfits,
  read_tensors,
  refuse,
  unflatten,
  write_tensors,
)
from mdt_jax.types import Params

GRAPH_SUFFIX = ".pb"
_BATCH_NORM_EPSILON = 1e-3
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")

# Modules in the order of the frozen graph, whose scopes are conv, conv_1, conv_2, ….
_STEM = (
  "Conv2d_1a_3x3",
  "Conv2d_2a_3x3",
  "Conv2d_2b_3x3",
  "Conv2d_3b_1x1",
  "Conv2d_4a_3x3",
)
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
_FINAL = {"softmax/weights": "fc.weight", "softmax/biases": "fc.bias"}
# Scope inside a block of the frozen graph -> modules, in the order of scope numbers.
_A = {
  "conv": ["branch1x1"],
  "tower/conv": ["branch5x5_1", "branch5x5_2"],
  "tower_1/conv": ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
  "tower_2/conv": ["branch_pool"],
}
_B = {
  "conv": ["branch3x3"],
  "tower/conv": ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
}
_C = {
  "conv": ["branch1x1"],
  "tower/conv": [f"branch7x7_{i}" for i in (1, 2, 3)],
  "tower_1/conv": [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)],
  "tower_2/conv": ["branch_pool"],
}
_D = {
  "tower/conv": ["branch3x3_1", "branch3x3_2"],
  "tower_1/conv": [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)],
}
_E = {
  "conv": ["branch1x1"],
  "tower/conv": ["branch3x3_1"],
  "tower/mixed/conv": ["branch3x3_2a", "branch3x3_2b"],
  "tower_1/conv": ["branch3x3dbl_1", "branch3x3dbl_2"],
  "tower_1/mixed/conv": ["branch3x3dbl_3a", "branch3x3dbl_3b"],
  "tower_2/conv": ["branch_pool"],
}
_LAYOUTS = (_A, _A, _A, _B, _C, _C, _C, _C, _D, _E, _E)


def load_inception(path: str | os.PathLike[str], setting: str = "path") -> Params:
  """Reads the parameters of `models.inception.Inception`.

  Args:
    path: an output of `convert_inception`, or one of the released files.
    setting: name of the path in errors.

  Returns:
    Parameters, float32 NumPy arrays.

  Raises:
    SettingError: the file does not exist, cannot be read safely, or holds the weights
      of another network.
  """
  with renamed_in_errors({"path": setting}):
    return to_params(_read(path))


def convert_inception(
  source: str | os.PathLike[str],
  target: str | os.PathLike[str],
  *,
  overwrite: bool = False,
) -> None:
  """Converts weights to .safetensors, which can be read without torch or TensorFlow.

  Args:
    source: a .pth or .pt file (opened with weights_only=True; needs torch), a .pb or
      a .safetensors file.
    target: output path; must end in .safetensors.
    overwrite: whether to replace an existing target.

  Raises:
    SettingError: `source` cannot be read, see `load_inception`; `target` does not end
      in .safetensors, or exists and `overwrite` is False. Nothing is written.
  """
  file = output_file("target", target)
  if file.suffix != ".safetensors":
    raise SettingError("target", str(file), "must end in .safetensors")
  if file.exists() and not overwrite:
    raise SettingError(
      "target", str(file), "exists already; set overwrite to replace it"
    )
  with renamed_in_errors({"path": "source"}):
    tensors = _read(source)
  write_tensors(file, tensors)


def to_params(tensors: Tensors) -> Params:
  """Converts tensors to parameters and folds batch normalisation into convolutions.

  Args:
    tensors: name -> array, with names and shapes of `tensor_shapes`.

  Returns:
    Parameters of `models.inception.Inception`, float32 NumPy arrays.
  """
  params = {"fc.kernel": tensors["fc.weight"].T}
  for module in _modules():
    gain, bias, mean, variance = (
      tensors[f"{module}.bn.{name}"].astype(np.float64) for name in _BATCH_NORM
    )
    scale = gain / np.sqrt(variance + _BATCH_NORM_EPSILON)
    kernel = tensors[f"{module}.conv.weight"].transpose(2, 3, 1, 0) * scale
    params[f"{module}.conv.kernel"] = kernel
    params[f"{module}.conv.bias"] = bias - mean * scale
  params = {path: np.asarray(a, np.float32, order="C") for path, a in params.items()}
  return unflatten(params, ".")


@functools.cache
def tensor_shapes() -> dict[str, tuple[int, ...]]:
  """Returns name -> shape for the tensors of pytorch-fid's state dict."""
  images = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
  variables = jax.eval_shape(lambda: Inception().init(jax.random.key(0), images))
  flat = flatten(variables["params"], ".")
  shapes = {"fc.weight": flat["fc.kernel"].shape[::-1], "fc.bias": (NUM_CLASSES,)}
  for module in _modules():
    height, width, fan_in, fan_out = flat[f"{module}.conv.kernel"].shape
    shapes[f"{module}.conv.weight"] = (fan_out, fan_in, height, width)
    shapes |= {f"{module}.bn.{name}": (fan_out,) for name in _BATCH_NORM}
  return shapes


def graph_names() -> dict[str, str]:
  """Returns name of a constant in the frozen graph -> name in `tensor_shapes`."""
  names = dict(_FINAL)
  leaves = dict(
    zip(("gamma", "beta", "moving_mean", "moving_variance"), _BATCH_NORM, strict=True)
  )
  for scope, module in zip(_scopes(), _modules(), strict=True):
    names[f"{scope}/conv2d_params"] = f"{module}.conv.weight"
    for theirs, ours in leaves.items():
      names[f"{scope}/batchnorm/{theirs}"] = f"{module}.bn.{ours}"
  return names


def _modules() -> Iterator[str]:
  """Yields the modules of all convolutions, such as "Mixed_5b.branch1x1"."""
  yield from _STEM
  for block, layout in zip(_BLOCKS, _LAYOUTS, strict=True):
    for branches in layout.values():
      yield from (f"Mixed_{block}.{branch}" for branch in branches)


def _scopes() -> Iterator[str]:
  """Yields the graph scopes of all convolutions, in the order of `_modules`."""

  def numbered(name: str, count: int) -> Iterator[str]:
    return (f"{name}_{i}" if i else name for i in range(count))

  yield from numbered("conv", len(_STEM))
  for block, layout in zip(numbered("mixed", len(_BLOCKS)), _LAYOUTS, strict=True):
    for tower, branches in layout.items():
      yield from (f"{block}/{name}" for name in numbered(tower, len(branches)))


def _read(path: str | os.PathLike[str]) -> Tensors:
  """Reads and checks a file; returns float32 tensors with pytorch-fid's names."""
  with local_weights(path, (*READABLE, GRAPH_SUFFIX)) as local:
    return _read_local(expand_home(local))


def _read_local(path: Path) -> Tensors:
  """Reads and checks a local file; see `_read`."""
  if os.path.isfile(path):  # False for names that are too long
    check_suffix("path", path, (*READABLE, GRAPH_SUFFIX))
  tensors = _read_graph(path) if path.suffix == GRAPH_SUFFIX else read_tensors(path)
  tensors = {
    name: tensor
    for name, tensor in tensors.items()
    if not name.endswith("num_batches_tracked")  # only used in training
  }
  _check(tensors, path)
  return {name: np.asarray(t, np.float32, order="C") for name, t in tensors.items()}


def _read_graph(path: Path) -> Tensors:
  """Reads the constants of a frozen graph, without running the graph."""
  check_file(path)
  # The package tensorboard holds TensorFlow's protocol buffers.
  from google.protobuf.message import DecodeError
  from tensorboard.compat.proto import graph_pb2
  from tensorboard.util.tensor_util import make_ndarray

  graph: Any = graph_pb2.GraphDef()  # pyright: ignore[reportAttributeAccessIssue]
  try:
    graph.ParseFromString(path.read_bytes())
  except DecodeError:
    raise SettingError(
      "path", str(path), "must be a frozen graph of TensorFlow"
    ) from None
  known, size = graph_names(), path.stat().st_size
  constants = {}
  for node in graph.node:
    if node.op != "Const" or node.name not in known:
      continue
    proto = node.attr["value"].tensor
    # make_ndarray repeats the last value until the shape is full.
    if math.prod(dim.size for dim in proto.tensor_shape.dim) > size:
      raise SettingError("path", str(path), f"is smaller than its tensor {node.name}")
    try:
      constants[node.name] = make_ndarray(proto).astype(np.float32, casting="same_kind")
    except (TypeError, ValueError, KeyError) as error:
      raise SettingError(
        "path", str(path), f"{node.name} cannot be read: {one_line(error)}"
      ) from None
  tensors = {
    ours: constants[theirs] for theirs, ours in known.items() if theirs in constants
  }
  for name, tensor in tensors.items():
    if tensor.ndim == 4:
      tensors[name] = tensor.transpose(3, 2, 0, 1)  # HWIO
    elif tensor.ndim == 2:
      tensors[name] = tensor.T
  return tensors


def _check(tensors: Tensors, path: Path) -> None:
  """Raises SettingError if tensors do not fit the network or are not finite."""
  problems = misfits(tensors, tensor_shapes())
  problems += [
    f"{name} must be finite"
    for name, tensor in tensors.items()
    if not np.isfinite(tensor).all()
  ]
  refuse("path", path, "must hold FID's Inception v3 of 2015", problems)
