"""A DiT in diffusers' format: its names, and its forward pass in PyTorch."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention
from torch.nn.functional import silu as act

from mdt_jax.models.embeddings import sincos_positions

OUTSIDE = {
  "x_embedder.proj": "pos_embed.proj",
  "final_layer.adaLN_modulation.1": "proj_out_1",
  "final_layer.linear": "proj_out_2",
}
INSIDE = {
  "adaLN_modulation.1": "norm1.linear",
  "attn.proj": "attn1.to_out.0",
  "mlp.fc1": "ff.net.0.proj",
  "mlp.fc2": "ff.net.2",
}
EMBEDDINGS = {
  "t_embedder.mlp.0": "timestep_embedder.linear_1",
  "t_embedder.mlp.2": "timestep_embedder.linear_2",
  "y_embedder.embedding_table": "class_embedder.embedding_table",
}


def to_diffusers(released):
  """Renames the released tensors of a DiT; leaves the position embedding out."""
  depth = len({name.split(".")[1] for name in released if name.startswith("blocks.")})
  tensors = {}
  for name, value in released.items():
    module, _, leaf = name.rpartition(".")
    if module in OUTSIDE:
      tensors[f"{OUTSIDE[module]}.{leaf}"] = value
    elif module in EMBEDDINGS:
      for i in range(depth):
        new = f"transformer_blocks.{i}.norm1.emb.{EMBEDDINGS[module]}.{leaf}"
        tensors[new] = value.copy()
    elif module.endswith("attn.qkv"):
      number = module.split(".")[1]
      for part, rows in zip("qkv", np.split(value, 3), strict=True):
        tensors[f"transformer_blocks.{number}.attn1.to_{part}.{leaf}"] = rows.copy()
    elif name != "pos_embed":
      _, number, inside = module.split(".", 2)
      tensors[f"transformer_blocks.{number}.{INSIDE[inside]}.{leaf}"] = value
  return tensors


def with_sincos_positions(released):
  """Replaces the position embedding by that of the released code."""
  _, length, width = released["pos_embed"].shape
  return {**released, "pos_embed": sincos_positions(width, math.isqrt(length))[None]}


def forward(tensors, x, t, y, positions, num_heads):
  """Runs a DiT of diffusers on x (B, C, H, W); timestep frequencies as in DiT."""
  w = {name: torch.tensor(value) for name, value in tensors.items()}
  x, t, y = (torch.tensor(value) for value in (x, t, y))

  def dense(name, inputs):
    return linear(inputs, w[f"{name}.weight"], w[f"{name}.bias"])

  def modulated(inputs, shift, scale):
    normed = layer_norm(inputs, inputs.shape[-1:], eps=1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]

  emb = "transformer_blocks.0.norm1.emb"
  angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
  c = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).float()
  c = act(dense(f"{emb}.timestep_embedder.linear_1", c))
  c = dense(f"{emb}.timestep_embedder.linear_2", c)
  c = c + w[f"{emb}.class_embedder.embedding_table.weight"][y]
  kernel = w["pos_embed.proj.weight"]
  patch = kernel.shape[-1]
  h = torch.nn.functional.conv2d(x, kernel, w["pos_embed.proj.bias"], stride=patch)
  grid = h.shape[-1]
  h = h.flatten(2).transpose(1, 2) + torch.tensor(positions)
  depth = sum(name.endswith("norm1.linear.bias") for name in w)
  for block in (f"transformer_blocks.{i}" for i in range(depth)):
    parts = dense(f"{block}.norm1.linear", act(c)).chunk(6, dim=1)
    a = modulated(h, parts[0], parts[1])
    q, k, v = (
      dense(f"{block}.attn1.to_{part}", a)
      .unflatten(-1, (num_heads, -1))
      .transpose(1, 2)
      for part in "qkv"
    )
    a = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    h = h + parts[2][:, None] * dense(f"{block}.attn1.to_out.0", a)
    a = modulated(h, parts[3], parts[4])
    a = dense(
      f"{block}.ff.net.2", gelu(dense(f"{block}.ff.net.0.proj", a), approximate="tanh")
    )
    h = h + parts[5][:, None] * a
  shift, scale = dense("proj_out_1", act(c)).chunk(2, dim=1)
  h = dense("proj_out_2", modulated(h, shift, scale))
  h = h.unflatten(-1, (patch, patch, -1)).unflatten(1, (grid, grid))
  h = torch.einsum("nhwpqc->nchpwq", h)
  return h.flatten(4, 5).flatten(2, 3).numpy()
