"""The table of hostile files, and the small network that most of them hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Kind = Callable[[Path, np.random.Generator], Path]
KINDS: dict[str, Kind] = {}  # name -> writes one file into a folder
WIDTH = 8  # of the network, which has 2 heads
LARGE = 2**40
BIAS = "blocks.0.mlp.fc1.bias"


def network() -> dict[str, np.ndarray]:
  """Tensors of a DiT of width WIDTH, one block and 3 classes, all of them fitting."""
  rng = np.random.default_rng(0)
  shapes = {
    "pos_embed": (1, 4, WIDTH),
    "x_embedder.proj.weight": (WIDTH, 4, 2, 2),
    "x_embedder.proj.bias": (WIDTH,),
    "t_embedder.mlp.0.weight": (WIDTH, 256),
    "t_embedder.mlp.0.bias": (WIDTH,),
    "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
    "t_embedder.mlp.2.bias": (WIDTH,),
    "y_embedder.embedding_table.weight": (4, WIDTH),
    "blocks.0.attn.qkv.weight": (3 * WIDTH, WIDTH),
    "blocks.0.attn.qkv.bias": (3 * WIDTH,),
    "blocks.0.attn.proj.weight": (WIDTH, WIDTH),
    "blocks.0.attn.proj.bias": (WIDTH,),
    "blocks.0.mlp.fc1.weight": (4 * WIDTH, WIDTH),
    "blocks.0.mlp.fc1.bias": (4 * WIDTH,),
    "blocks.0.mlp.fc2.weight": (WIDTH, 4 * WIDTH),
    "blocks.0.mlp.fc2.bias": (WIDTH,),
    "blocks.0.adaLN_modulation.1.weight": (6 * WIDTH, WIDTH),
    "blocks.0.adaLN_modulation.1.bias": (6 * WIDTH,),
    "final_layer.linear.weight": (32, WIDTH),
    "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
    "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
  }
  return {
    name: rng.standard_normal(shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def changed(name: str, value: Any) -> dict[str, Any]:
  """The tensors of `network` with one more or one replaced."""
  return {**network(), name: value}


def as_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
  return {name: torch.tensor(array) for name, array in tensors.items()}
