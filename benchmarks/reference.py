"""The released PyTorch code as functions to time.

Needs a checkout of github.com/sail-sg/MDT (branch main for MDTv2, branch mdtv1 for
MDT). timm must be installed, and adan.py of github.com/sail-sg/Adan must be in the
checkout or installed.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable

import torch

from mdt_jax.models.mdt import MDT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Reference:
  """A released network with its optimizer, parameter average and diffusion process.

  Args:
    path: folder of the checkout.
    name: name of the network in mdt_jax, such as "MDTv2-S/2".
    model: the network of mdt_jax, for its sizes.
    masked_share: mean share of masked tokens, in [0, 1].
    batch_size: images per step.
    dtype: "float32", or "bfloat16" for autocast.
    compiled: whether to use torch.compile.
    threads: number of CPU threads; None for PyTorch's default.
  """

  def __init__(
    self,
    path: str,
    name: str,
    model: MDT,
    *,
    masked_share: float,
    batch_size: int,
    dtype: str,
    compiled: bool = False,
    threads: int | None = None,
  ):
    if path not in sys.path:
      sys.path.insert(0, path)
    models = importlib.import_module("masked_diffusion.models")
    create_diffusion = importlib.import_module("masked_diffusion").create_diffusion
    if threads:
      torch.set_num_threads(threads)
    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # MDTv2 draws the masked share from [mask_ratio, mask_ratio + 0.2].
    shift = 0.1 if model.variant == "MDTv2" else 0.0
    network = getattr(models, name.replace("-", "_").replace("/", "_"))(
      input_size=model.input_size,
      num_classes=model.num_classes,
      mask_ratio=masked_share - shift,
      decode_layer=model.decode_depth,
    )
    self._network = network.to(self._device)
    self._run = torch.compile(self._network) if compiled else self._network
    self._diffusion = create_diffusion("")
    parameters = [p for p in self._network.parameters() if p.requires_grad]
    if model.variant == "MDTv2":
      adan = importlib.import_module("adan").Adan
      # The released run.sh uses the fused kernel, which needs a GPU and a compiler.
      self._optimizer = adan(parameters, lr=3e-4, max_grad_norm=1, foreach=True)
    else:
      self._optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0)
    self._parameters = parameters
    self._average = [p.detach().clone() for p in parameters]
    shape = (batch_size, model.in_channels, model.input_size, model.input_size)
    self._x = torch.randn(shape, device=self._device)
    self._y = torch.randint(model.num_classes, (batch_size,), device=self._device)
    self._autocast = dtype != "float32"
    self._dtype = DTYPES[dtype]

  def train_step(self) -> None:
    """A training step as released: both passes, gradient, optimizer and average."""
    self._network.train()
    self._optimizer.zero_grad()
    t = torch.randint(1000, (len(self._x),), device=self._device)
    with self._precision():
      total = 0.0
      for kwargs in ({}, {"enable_mask": True}):
        losses = self._diffusion.training_losses(
          self._run, self._x, t, model_kwargs={"y": self._y} | kwargs
        )
        total = total + losses["loss"].mean()
    total.backward()
    self._optimizer.step()
    with torch.no_grad():
      torch._foreach_mul_(self._average, 0.9999)
      torch._foreach_add_(self._average, self._parameters, alpha=1e-4)
    self._wait()

  def guided_step(self, cfg_scale: float) -> Callable[[], None]:
    """Returns a function that runs one step of 250-step DDPM with guidance.

    The conditional and the unconditional pass are one batch, as released.
    """
    create_diffusion = importlib.import_module("masked_diffusion").create_diffusion
    diffusion = create_diffusion("250")
    x = torch.cat([self._x, self._x])
    null = torch.full_like(self._y, self._network.y_embedder.num_classes)
    y = torch.cat([self._y, null])
    t = torch.full((len(x),), 125, device=self._device)
    network = copy.deepcopy(self._network).eval()
    guided = network.forward_with_cfg
    if self._run is not self._network:
      guided = torch.compile(guided)

    @torch.no_grad()
    def step() -> None:
      with self._precision():
        diffusion.p_sample(
          guided,
          x,
          t,
          clip_denoised=False,
          model_kwargs={"y": y, "cfg_scale": cfg_scale},
        )
      self._wait()

    return step

  def peak_bytes(self) -> int | None:
    """Peak GPU memory since the start of the process; None on a CPU."""
    if self._device == "cuda":
      return torch.cuda.max_memory_allocated()
    return None

  def _precision(self) -> torch.autocast:
    """The context of the compute type."""
    return torch.autocast(self._device, self._dtype, enabled=self._autocast)

  def _wait(self) -> None:
    """Waits for the GPU."""
    if self._device == "cuda":
      torch.cuda.synchronize()
