"""The released PyTorch code of a checkout, with random draws that mdt_jax made.

Used by benchmarks.trajectory and benchmarks.random_networks. timm must be installed,
and adan.py of github.com/sail-sg/Adan must be in the checkout of MDTv2 or installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdt_jax.models.mdt import MDT
from mdt_jax.pretrained.tensors import Tensors

WIDTH = 0.2  # of the range from which MDTv2 draws the mask ratio
# Attributes of our network that the released classes take by the same names.
_SHARED = ("input_size", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")


@dataclasses.dataclass(frozen=True)
class Released:
  """The released code of a checkout.

  Attributes:
    variant: "DiT", "MDT" or "MDTv2".
    network: class of the network.
    create_diffusion: builds the process.
    adan: class of the optimizer of MDTv2; None for the others, which use AdamW.
  """

  variant: str
  network: Any
  create_diffusion: Any
  adan: Any = None

  @classmethod
  def load(cls, path: str) -> Released:
    """Imports the code of a checkout; the next checkout may have equal names."""
    is_dit = not (Path(path) / "masked_diffusion").is_dir()
    roots = ("models", "diffusion") if is_dit else ("masked_diffusion",)
    for name in list(sys.modules):
      if name.partition(".")[0] in roots:
        del sys.modules[name]
    sys.path.insert(0, path)
    try:
      models = importlib.import_module("models" if is_dit else f"{roots[0]}.models")
      create = importlib.import_module(roots[-1]).create_diffusion
      for variant in ("MDTv2", "MDT", "DiT"):
        if network := getattr(models, variant, None):
          adan = importlib.import_module("adan").Adan if variant == "MDTv2" else None
          return cls(variant, network, create, adan)
    finally:
      sys.path.remove(path)
    raise ValueError(f"{path} holds no released network")

  def make_network(
    self,
    model: MDT,
    tensors: Mapping[str, np.ndarray],
    dtype: torch.dtype,
    mask_ratio: float = 0.3,
  ) -> Any:
    """Builds the released network, which draws no dropped labels.

    Args:
      model: our network, for its sizes.
      tensors: released name -> tensor.
      dtype: type of parameters and computation.
      mask_ratio: ratio of the masked pass of MDT, and the smallest one of MDTv2.
    """
    sizes: dict[str, Any] = {name: getattr(model, name) for name in _SHARED}
    if model.takes_mask:
      sizes |= dict(mask_ratio=mask_ratio, decode_layer=model.decode_depth)
    network = self.network(
      in_channels=model.in_channels, num_classes=model.num_classes, **sizes
    )
    network.load_state_dict({name: torch.tensor(t) for name, t in tensors.items()})
    network = network.to(dtype).train()
    network.y_embedder.dropout_prob = 0.0
    # The sinusoids are float32 in the released code, whatever the type of the network.
    network.t_embedder.mlp.register_forward_pre_hook(
      lambda module, inputs: tuple(x.to(dtype) for x in inputs)
    )
    return network

  @contextlib.contextmanager
  def masks(
    self, noise: torch.Tensor, num_keep: int, mask_ratio: float = 0.3
  ) -> Iterator[None]:
    """Context in which the released network keeps `num_keep` tokens by this noise.

    The released code draws masks by torch.rand, which the context replaces.
    """
    draws = [noise]
    share = 1 - (num_keep + 0.5) / noise.shape[1]
    if self.variant == "MDTv2":  # draws the ratio first: mask_ratio + 0.2 u
      draws.insert(0, torch.tensor([(share - mask_ratio) / WIDTH]))
    with replaced_draws("rand", draws):
      yield


@contextlib.contextmanager
def replaced_draws(function: str, draws: list[torch.Tensor]) -> Iterator[None]:
  """Context in which a function of torch returns the given random numbers in turn.

  Raises:
    AssertionError: some of the numbers were not used.
  """
  left = list(draws)
  original = getattr(torch, function)
  setattr(torch, function, lambda *args, **kwargs: left.pop(0))
  try:
    yield
  finally:
    setattr(torch, function, original)
  assert not left, f"the released code left {len(left)} draws"


def to_nchw(array: Any, dtype: torch.dtype) -> torch.Tensor:
  """Converts channels-last images to a tensor (B, C, H, W)."""
  return torch.tensor(np.moveaxis(np.asarray(array), -1, 1)).to(dtype)


def parameters_of(network: Any) -> Tensors:
  """A copy of the parameters by name."""
  return {
    name: tensor.detach().numpy().copy() for name, tensor in network.named_parameters()
  }
