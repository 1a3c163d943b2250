"""Weights of the Inception of 2015: from its files to our parameters.

Three files can be read: the state dicts of pytorch-fid
(pt_inception-2015-12-05-6726825d.pth) and of torch-fidelity
(weights-inception-2015-12-05-6726825d.pth), and the frozen graph that both come from
(classify_image_graph_def.pb of inception-2015-12-05.tgz). `convert_inception` writes
the tensors under the names of pytorch-fid.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.models.inception import IMAGE_SIZE, NUM_CLASSES, Inception
from mdt_jax.pretrained.tensors import (
  Tensors,
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

# Modules in the order of the frozen graph, which numbers its scopes conv, conv_1, ….
_STEM = (
  "Conv2d_1a_3x3",
  "Conv2d_2a_3x3",
  "Conv2d_2b_3x3",
  "Conv2d_3b_1x1",
  "Conv2d_4a_3x3",
)
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
_FINAL = {"softmax/weights": "fc.weight", "softmax/biases": "fc.bias"}
# Scope in a block of the frozen graph -> modules here, in the order of the numbers.
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


def load_inception(path: str | Path, setting: str = "path") -> Params:
  """Reads parameters of `Inception`, float32 NumPy arrays.

  Args:
    path: .safetensors as `convert_inception` writes it, or a file that it reads.
    setting: what errors call the path.

  Raises:
    SettingError: the file is not there, or cannot be read safely, or is of another
      network.
  """
  with renamed_in_errors({"path": setting}):
    return to_params(_read(path))


def convert_inception(
  source: str | Path, target: str | Path, *, overwrite: bool = False
) -> None:
  """Converts a file to .safetensors, which needs neither torch nor TensorFlow.

  Args:
    source: .pth or .pt (opened with weights_only=True, needs torch), .pb, or
      .safetensors.
    target: must end in .safetensors.
    overwrite: replace that file.

  Raises:
    SettingError: as `load_inception` raises it; or `target` ends otherwise, or exists
      and `overwrite` is not set. Nothing is written then.
  """
  target = Path(target)
  if target.suffix != ".safetensors":
    raise SettingError("target", str(target), "must end in .safetensors")
  if target.exists() and not overwrite:
    raise SettingError(
      "target", str(target), "exists already, and overwrite is not set"
    )
  with renamed_in_errors({"path": "source"}):
    tensors = _read(source)
  write_tensors(target, tensors)


def to_params(tensors: Tensors) -> Params:
  """Folds the batch normalisation into the convolutions.

  Args:
    tensors: by the names and in the shapes of `tensor_shapes`.

  Returns:
    Parameters of `Inception`, float32 NumPy arrays.
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
  """Names and shapes of the tensors of pytorch-fid's state dict."""
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
  """Constants of the frozen graph -> names of `tensor_shapes`."""
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
  """Names of the modules of all convolutions, such as Mixed_5b.branch1x1."""
  yield from _STEM
  for block, layout in zip(_BLOCKS, _LAYOUTS, strict=True):
    for branches in layout.values():
      yield from (f"Mixed_{block}.{branch}" for branch in branches)


def _scopes() -> Iterator[str]:
  """Names of the scopes of all convolutions, in the order of `_modules`."""

  def numbered(name: str, count: int) -> Iterator[str]:
    return (f"{name}_{i}" if i else name for i in range(count))

  yield from numbered("conv", len(_STEM))
  for block, layout in zip(numbered("mixed", len(_BLOCKS)), _LAYOUTS, strict=True):
    for tower, branches in layout.items():
      yield from (f"{block}/{name}" for name in numbered(tower, len(branches)))


def _read(path: str | Path) -> Tensors:
  """Reads and checks the tensors of a file: pytorch-fid's names, float32."""
  path = Path(path)
  tensors = _read_graph(path) if path.suffix == GRAPH_SUFFIX else read_tensors(path)
  tensors = {
    name: tensor
    for name, tensor in tensors.items()
    if not name.endswith("num_batches_tracked")  # a counter of training
  }
  _check(tensors, path)
  return {name: np.asarray(t, np.float32, order="C") for name, t in tensors.items()}


def _read_graph(path: Path) -> Tensors:
  """Reads the constants of a frozen graph. The graph itself is not run."""
  if not path.is_file():
    raise SettingError("path", str(path), "must be a file")
  import tensorflow as tf  # takes seconds
  from google.protobuf.message import DecodeError

  graph = tf.compat.v1.GraphDef()
  try:
    graph.ParseFromString(path.read_bytes())
  except DecodeError:
    raise SettingError("path", str(path), "no frozen graph of TensorFlow") from None
  constants = {
    node.name: tf.make_ndarray(node.attr["value"].tensor)
    for node in graph.node
    if node.op == "Const"
  }
  tensors = {
    ours: constants[theirs]
    for theirs, ours in graph_names().items()
    if theirs in constants
  }
  for name, tensor in tensors.items():
    if tensor.ndim == 4:
      tensors[name] = tensor.transpose(3, 2, 0, 1)  # HWIO
    elif tensor.ndim == 2:
      tensors[name] = tensor.T
  return tensors


def _check(tensors: Tensors, path: Path) -> None:
  """Raises SettingError that names the tensors that do not fit."""
  problems = misfits(tensors, tensor_shapes())
  problems += [
    f"{name} holds numbers that are not finite"
    for name, tensor in tensors.items()
    if not np.isfinite(tensor).all()
  ]
  refuse("path", path, "not the Inception of 2015 that FID is defined on", problems)
