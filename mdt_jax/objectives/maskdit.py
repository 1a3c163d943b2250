"""The objective of MaskDiT (arXiv 2306.09305): one pass on a part of the tokens.

The network denoises the tokens that it sees, and reconstructs the noisy input of the
removed tokens. The source is Anima-Lab/MaskDiT (train_utils/loss.py).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float

from mdt_jax.diffusion.process import Process, like
from mdt_jax.diffusion.timestep_samplers import TimestepSampler
from mdt_jax.errors import SettingError, check_number
from mdt_jax.models.embeddings import patchify
from mdt_jax.models.masking import TokenMask
from mdt_jax.models.registry import Model
from mdt_jax.objectives.objective import OBJECTIVES, Apply, Draws, Losses
from mdt_jax.objectives.tokens import TokenObjective, masked_mean, mean_over
from mdt_jax.types import Array, Params

PATCH_EPS = 1e-6  # added to the variance of a patch
# Predictions whose error of x0 is that of the output times sigma / alpha, or more.
_UNBOUNDED = ("epsilon", "score")


class MaskDiTObjective(TokenObjective):
  """The denoising loss of the kept tokens, and the reconstruction of the others.

  The denoising loss is that of the process, averaged over the kept tokens. The
  reconstruction loss is the squared difference between D, the x0 that the network
  predicts, and the noisy input, of which each patch is normalised; it is averaged over
  the removed tokens. The loss of a step without removed tokens is that of the process.

  The released code trains by EDM. Here any process may be used whose D has a bounded
  error: edm, flow with velocities or x0, gaussian with v or x0. If the variance is
  learned, its term is averaged over the kept tokens, and the reconstruction does not
  train it.

  Args:
    model: a network that accepts a token mask, such as MaskDiT or MDT.
    process, timestep_sampler: see `Objective`.
    mae_weight: weight of the reconstruction loss, at least 0; 0: none.
    ratio: share of removed tokens; see `TokenObjective`.
    schedule, min_ratio, num_lengths, num_steps: see `TokenObjective`.

  Raises:
    SettingError: a value is out of range, or the network or the process does not fit.
  """

  name = "maskdit"
  averages_kept = True

  def __init__(
    self,
    model: Model,
    process: Process,
    timestep_sampler: TimestepSampler | None = None,
    *,
    mae_weight: float = 0.1,
    ratio: float | None = None,
    schedule: str = "constant",
    min_ratio: float = 0.0,
    num_lengths: int = 8,
    num_steps: int | None = None,
  ):
    super().__init__(
      model,
      process,
      timestep_sampler,
      ratio=ratio,
      schedule=schedule,
      min_ratio=min_ratio,
      num_lengths=num_lengths,
      num_steps=num_steps,
    )
    check_number("mae_weight", mae_weight)
    if mae_weight < 0:
      raise SettingError("mae_weight", mae_weight, "must be at least 0")
    prediction = getattr(process, "prediction", None)
    if mae_weight and prediction in _UNBOUNDED:
      raise SettingError(
        "mae_weight",
        mae_weight,
        f"must be 0 with the prediction {prediction!r}, of unbounded error of x0; "
        "accepted are edm, flow with velocity or x0, gaussian with v or x0",
      )
    if mae_weight and model.patch_size**2 * model.in_channels < 2:
      raise SettingError(
        "mae_weight", mae_weight, "must be 0: a patch of one number has no variance"
      )
    self.mae_weight = mae_weight

  def check_model(self) -> None:
    """Raises SettingError if the network does not predict removed tokens."""
    if not self.model.takes_mask:
      raise self.refuse_model("predicts no removed tokens; use a MaskDiT or MDT")

  def token_losses(
    self, apply: Apply, params: Params, draws: Draws, mask: TokenMask | None
  ) -> Losses:
    """Computes the losses: "loss" of the process, and "reconstruction".

    The reconstruction is 0 without a mask, and absent if `mae_weight` is 0: training
    logs the same names in each step of a run.
    """
    reconstruction = None
    if mask is None:
      losses = self.pass_losses(apply, params, draws, 0)
      if self.mae_weight:
        reconstruction = jnp.zeros_like(losses["loss"])
    else:
      x_t, output = self.run_pass(apply, params, draws, 0, mask)
      kept = mean_over(~mask.removed, self.model.patch_size)
      losses = self.losses_of_output(output, x_t, draws, 0, kept)
      if self.mae_weight:
        reconstruction = self._reconstruction(output, x_t, draws.t, mask)
    if reconstruction is None:
      return {**losses, "total": losses["loss"]}
    total = losses["loss"] + self.mae_weight * reconstruction
    return {**losses, "reconstruction": reconstruction, "total": total}

  def _reconstruction(
    self, output: Array, x_t: Array, t: Array, mask: TokenMask
  ) -> Float[Array, " B"]:
    """Computes the mean over removed patches of (D - normalised noisy input)^2."""
    p = self.model.patch_size
    denoised = self.process.to_x0(output.astype(jnp.float32), x_t, t)  # D
    # The noisy input of EDM is x_t / alpha. The factor cancels but for eps; multiplying
    # eps instead of dividing x_t is exact, and finite where alpha is 0.
    eps = PATCH_EPS * like(self.process.alpha(t) ** 2, x_t)
    target = _normalise(patchify(x_t, p), eps.reshape(-1, 1, 1))
    error = jnp.mean((patchify(denoised, p) - target) ** 2, axis=-1)  # (B, L)
    return masked_mean(error, mask.removed)


def _normalise(
  patches: Float[Array, "B L P"], eps: Float[Array, "B 1 1"]
) -> Float[Array, "B L P"]:
  """Gives each patch mean 0 and variance 1, the variance with divisor P - 1."""
  centred = patches - patches.mean(-1, keepdims=True)
  variance = jnp.var(patches, axis=-1, ddof=1, keepdims=True)
  return centred / jnp.sqrt(variance + eps)


OBJECTIVES["maskdit"] = MaskDiTObjective
