"""Hostile folders of autoencoders: config.json and weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tests.pretrained.hostile_weights import KINDS

AUTOENCODER = {
  "_class_name": "AutoencoderKL",
  "act_fn": "silu",
  "block_out_channels": [8, 8],
  "down_block_types": ["DownEncoderBlock2D"] * 2,
  "up_block_types": ["UpDecoderBlock2D"] * 2,
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 1,
  "norm_num_groups": 2,
  "out_channels": 3,
  "scaling_factor": 0.18215,
}
_VALUES: tuple[Any, ...] = (
  None,
  True,
  0,
  -1,
  1.5,
  1e308,
  10**40,
  float("nan"),
  float("inf"),
  "",
  "8",
  "AutoencoderTiny",
  [],
  [[8], [8]],
  [8] * 100,
  [1e308, 8],
  {"a": 1},
  ["DownBlock2D", "DownBlock2D"],
)
_SETTINGS = (
  *AUTOENCODER,
  "latents_mean",
  "latents_std",
  "shift_factor",
  "use_quant_conv",
  "use_post_quant_conv",
  "mid_block_add_attention",
)
_CONFIGS = ("", "{", "[]", "null", "\x80", "[" * 10**5, "1" * 5000, "NaN", " " * 2**21)


def autoencoders(folder: Path, seed: int, count: int) -> list[Path]:
  """Writes folders of autoencoders with hostile config.json or weights.

  Args:
    folder: folder to write into; created if needed.
    seed: seed of all draws.
    count: number of folders.

  Returns:
    Paths to pass as --vae.
  """
  paths = []
  for i in range(count):
    rng = np.random.default_rng([seed, i])
    path = folder / f"{i:04d}"
    path.mkdir(parents=True)
    config: dict[str, Any] = dict(AUTOENCODER)
    case = ("text", "without", "changed", "weights")[i % 4]
    if case == "without":
      del config[str(rng.choice(list(config)))]
    if case == "changed":
      for _ in range(int(rng.integers(1, 3))):
        config[str(rng.choice(_SETTINGS))] = _VALUES[int(rng.integers(len(_VALUES)))]
    text = json.dumps(config)
    if case == "text":
      text = _CONFIGS[int(rng.integers(len(_CONFIGS)))]
    (path / "config.json").write_bytes(text.encode("latin-1"))
    source = path / "weights"
    source.mkdir()
    source = KINDS[str(rng.choice(list(KINDS)))](source, rng)
    if os.path.lexists(source):
      suffix = source.suffix if source.suffix == ".safetensors" else ".bin"
      source.rename(path / f"diffusion_pytorch_model{suffix}")
    paths.append(path)
  return paths
