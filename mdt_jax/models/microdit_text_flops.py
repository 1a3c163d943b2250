"""Counts the floating-point operations of `MicroDiTText`; see `models.flops`."""

from __future__ import annotations

from mdt_jax.models.microdit_text import MicroDiTText
from mdt_jax.models.microdit_text_blocks import NUM_FREQUENCIES


def forward_flops(model: MicroDiTText, num_keep: int | None = None) -> int:
  """Counts the operations of a forward pass over one image; see `models.flops`.

  Args:
    model: the network. Captions have `caption_length` tokens.
    num_keep: number of tokens that the blocks after the mixer see; None for all.
  """
  length, captions = model.num_tokens, model.caption_length
  kept = length if num_keep is None else num_keep
  dim, mixer = model.hidden_size, model.mixer_hidden_size
  patch = model.patch_size**2
  flops = 2 * length * patch * model.in_channels * dim
  flops += 2 * (NUM_FREQUENCIES * dim + dim**2)  # timestep
  flops += 2 * captions * (model.caption_channels * dim + dim**2)
  flops += _attention_flops(captions, captions, dim, dim, 3 * captions * dim)
  flops += 2 * captions * 3 * dim * model.caption_mlp_width
  flops += 2 * 2 * dim**2  # the pooled caption
  if mixer != dim:
    flops += 2 * (length + captions + kept) * dim * mixer
  for i, width in enumerate(model.mixer_mlp_widths):
    experts = model.experts_of(i, mixer=True)
    flops += _block_flops(model, length, mixer, mixer, width, experts)
  for i, widths in enumerate(
    zip(model.attention_widths, model.mlp_widths, strict=True)
  ):
    flops += _block_flops(model, kept, dim, *widths, model.experts_of(i))
  flops += 2 * dim * 2 * dim  # modulation of the last layer
  return flops + 2 * kept * dim * patch * model.out_channels


def _block_flops(
  model: MicroDiTText,
  length: int,
  dim: int,
  attention_width: int,
  width: int,
  experts: int,
) -> int:
  """Counts the operations of a block on `length` tokens of width `dim`."""
  captions = model.caption_length
  flops = 2 * model.hidden_size * 6 * dim  # modulation
  maps = 3 * length * attention_width
  flops += _attention_flops(length, length, dim, attention_width, maps)
  maps = (length + 2 * captions) * dim
  flops += _attention_flops(length, captions, dim, dim, maps)
  if not experts:
    return flops + 2 * length * 3 * dim * width
  chosen = experts * int(model.expert_capacity * length / experts)
  return flops + 2 * length * dim * experts + 2 * chosen * 2 * dim * width


def _attention_flops(queries: int, keys: int, dim: int, width: int, maps: int) -> int:
  """Counts an attention layer; `maps` numbers of queries, keys and values."""
  return 2 * dim * maps + 2 * 2 * queries * keys * width + 2 * queries * width * dim
