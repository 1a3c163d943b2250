"""The network TREAD (arXiv 2501.04765): a DiT in which some tokens skip some blocks.

The source is CompVis/tread (dit.py, routing_module.py). Letters in shapes: see
`models.mdt`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from mdt_jax.errors import SettingError
from mdt_jax.models import mdt_flops
from mdt_jax.models.masking import TokenMask, keep_tokens, restore_tokens
from mdt_jax.models.mdt import MDT
from mdt_jax.types import Array


class TREAD(MDT, kw_only=True):
  """DiT with a route: blocks that see only the kept tokens of a token mask.

  With a token mask, the blocks route_start … route_end see the kept tokens, in the
  order of `ids_keep`. The removed tokens skip these blocks: the block after the route
  receives them as the block route_start would have. All tokens are trained. Without a
  token mask, as in sampling, the network is DiT. There are no parameters besides those
  of DiT, and the variance is not learned unless learn_sigma is set.

  The released code accepts several routes; this network has one, as in the paper's
  runs.

  With a token mask, "route_input" and "route_output" (B, L, D), all tokens before and
  after the route, are sown into the collection "intermediates"; the outputs of the
  blocks are not captured.

  Attributes (in addition to those of `MDT`):
    route_start: index of the first block of the route, counted from 0.
    route_end: index of the last block of the route; None for depth - 4, as released.
  """

  variant: str = "TREAD"
  learn_sigma: bool = False
  route_start: int = 2
  route_end: int | None = None

  variants: ClassVar[tuple[str, ...]] = ("TREAD",)

  @property
  def has_route(self) -> bool:
    return True

  def num_kept(self, ratio: float) -> int:
    """Returns L - int(L ratio), the number of tokens that the released code keeps."""
    return self.num_tokens - int(self.num_tokens * ratio)

  @property
  def route(self) -> range:
    """Indices of the blocks that see only the kept tokens."""
    end = self.depth - 4 if self.route_end is None else self.route_end
    return range(self.route_start, end + 1)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B H W C"],
    t: Shaped[Array, "B"],
    y: Shaped[Array, "B *_"],
    token_mask: TokenMask | None = None,
    train: bool = False,
  ) -> Float[Array, "B H W out_channels"]:
    """Predicts what the process trains: noise, a velocity, or EDM's F.

    Args:
      x, t, y, train: see `MDT`. The released networks receive ln(sigma) / 4 of EDM as
        t, or times in [0, 1] of a flow.
      token_mask: the tokens that the blocks of the route see; None for all.

    Returns:
      (B, H, W, out_channels) float32.

    Raises:
      SettingError: an attribute is invalid.
      ValueError: `x` has another shape.
    """
    self.check()
    self.check_input(x)
    tokens, c = self._embed(x, t, y, train)  # (B, L, D), (B, D)
    blocks: Any = self._blocks("blocks", self.depth)
    if token_mask is None or self.is_initializing():
      tokens, _ = blocks(tokens, c, None, None)
    else:
      tokens = self._run_route(blocks.variables["params"], tokens, c, token_mask)
    return self._output(tokens, c)

  def _run_route(
    self, params: Any, tokens: Array, c: Array, token_mask: TokenMask
  ) -> Float[Array, "B L D"]:
    """Runs all blocks, those of the route on the kept tokens.

    Args:
      params: parameters of all blocks, stacked along axis 0.
      tokens: (B, L, D) embedded tokens.
      c: (B, D).
      token_mask: keeps K tokens of each image.
    """
    start, stop = self.route.start, self.route.stop
    before = self._run(params, 0, start, tokens, c)  # (B, L, D)
    self.sow("intermediates", "route_input", before)
    kept = keep_tokens(before, token_mask)  # (B, K, D)
    kept = self._run(params, start, stop, kept, c)
    restored = restore_tokens(kept, jnp.zeros(self.hidden_size), token_mask)
    after = jnp.where(token_mask.removed[..., None], before, restored)  # (B, L, D)
    self.sow("intermediates", "route_output", after)
    return self._run(params, stop, self.depth, after, c)

  def _run(self, params: Any, start: int, stop: int, tokens: Array, c: Array) -> Array:
    """Runs the blocks start … stop - 1 on tokens (B, K, D)."""
    if start == stop:
      return tokens
    part = jax.tree.map(lambda stack: stack[start:stop], params)
    # Not a submodule, because the parameters are a part of those of "blocks".
    blocks: Any = self._blocks("blocks", stop - start, parent=None)
    return blocks.apply({"params": part}, tokens, c, None, None)[0]

  def check(self) -> None:
    """Raises SettingError if an attribute is invalid."""
    super().check()
    start, end = self.route.start, self.route.stop - 1
    if not 0 <= start < self.depth:
      accepted = f"must lie in [0, depth - 1 = {self.depth - 1}]"
      raise SettingError("route_start", start, accepted)
    if not start <= end < self.depth:
      accepted = f"must lie in [route_start = {start}, depth - 1 = {self.depth - 1}]"
      raise SettingError("route_end", end, accepted)


def forward_flops(model: TREAD, num_keep: int | None = None) -> int:
  """Counts the operations of a forward pass over one image; see `models.flops`.

  Args:
    model: the network.
    num_keep: number of tokens that the blocks of the route see; None for all.
  """
  flops = mdt_flops.forward_flops(model)
  if num_keep is None:
    return flops
  of_all = mdt_flops.block_flops(model, model.num_tokens)
  return flops - len(model.route) * (of_all - mdt_flops.block_flops(model, num_keep))
