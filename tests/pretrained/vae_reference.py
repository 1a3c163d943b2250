"""The autoencoder of diffusers in PyTorch, from its tensors and its config.json."""

from __future__ import annotations

import torch
from torch.nn.functional import conv2d, group_norm, interpolate, linear, pad, silu


class Reference:
  """`AutoencoderKL` of diffusers, as functions of the tensors of its file.

  Args:
    tensors: name -> array.
    config: contents of config.json.
  """

  def __init__(self, tensors, config):
    self.tensors = {name: torch.tensor(value) for name, value in tensors.items()}
    self.config = config

  def encode(self, images):
    """(B, C, H, W) -> mean and log variance of the latents, (B, c, h, w) each."""
    x = self._conv("encoder.conv_in", torch.tensor(images))
    levels = len(self.config["block_out_channels"])
    for i in range(levels):
      block = f"encoder.down_blocks.{i}"
      for j in range(self.config["layers_per_block"]):
        x = self._resnet(f"{block}.resnets.{j}", x)
      if i < levels - 1:
        x = pad(x, (0, 1, 0, 1))
        x = self._conv(f"{block}.downsamplers.0.conv", x, stride=2, padding=0)
    x = self._out("encoder", self._middle("encoder.mid_block", x))
    if self.config["use_quant_conv"]:
      x = self._conv("quant_conv", x, padding=0)
    mean, logvar = x.chunk(2, dim=1)
    return mean.numpy(), logvar.clamp(-30, 20).numpy()

  def decode(self, latents):
    """(B, c, h, w) -> images (B, C, H, W)."""
    x = torch.tensor(latents)
    if self.config["use_post_quant_conv"]:
      x = self._conv("post_quant_conv", x, padding=0)
    x = self._middle("decoder.mid_block", self._conv("decoder.conv_in", x))
    levels = len(self.config["block_out_channels"])
    for i in range(levels):
      block = f"decoder.up_blocks.{i}"
      for j in range(self.config["layers_per_block"] + 1):
        x = self._resnet(f"{block}.resnets.{j}", x)
      if i < levels - 1:
        x = interpolate(x, scale_factor=2, mode="nearest")
        x = self._conv(f"{block}.upsamplers.0.conv", x)
    return self._out("decoder", x).numpy()

  def _weights(self, name):
    return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

  def _conv(self, name, x, stride=1, padding=1):
    return conv2d(x, *self._weights(name), stride=stride, padding=padding)

  def _norm(self, name, x):
    return group_norm(x, self.config["norm_num_groups"], *self._weights(name), eps=1e-6)

  def _out(self, name, x):
    return self._conv(f"{name}.conv_out", silu(self._norm(f"{name}.conv_norm_out", x)))

  def _resnet(self, name, x):
    h = self._conv(f"{name}.conv1", silu(self._norm(f"{name}.norm1", x)))
    h = self._conv(f"{name}.conv2", silu(self._norm(f"{name}.norm2", h)))
    if f"{name}.conv_shortcut.weight" in self.tensors:
      x = self._conv(f"{name}.conv_shortcut", x, padding=0)
    return x + h

  def _middle(self, name, x):
    x = self._resnet(f"{name}.resnets.0", x)
    if self.config["mid_block_add_attention"]:
      x = x + self._attend(f"{name}.attentions.0", x)
    return self._resnet(f"{name}.resnets.1", x)

  def _attend(self, name, x):
    h = self._norm(f"{name}.group_norm", x).flatten(2).transpose(1, 2)
    q, k, v = (linear(h, *self._weights(f"{name}.to_{part}")) for part in "qkv")
    weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
    h = linear(weights @ v, *self._weights(f"{name}.to_out.0"))
    return h.transpose(1, 2).unflatten(2, x.shape[2:])
