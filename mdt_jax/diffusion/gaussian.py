"""The Gaussian diffusion process: q, p and the training losses.

Equations are those of DDPM (arXiv 2006.11239) and improved DDPM (arXiv 2102.09672).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mdt_jax.diffusion.densities import discretized_log_likelihood, normal_kl
from mdt_jax.diffusion.process import PROCESSES, Levels, Process, mean_flat
from mdt_jax.diffusion.schedules import (
  SPACINGS,
  log_snr,
  make_betas,
  solver_timesteps,
  spaced_timesteps,
)
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.types import Array

PREDICTIONS = ("epsilon", "x0", "v")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
LOSS_WEIGHTS = ("none", "min_snr")


class Prediction(NamedTuple):
  """Mean, variance, log variance and predicted x0 of p(x_{t-1} | x_t), (B, H, W, C)."""

  mean: Array
  variance: Array
  log_variance: Array
  x0: Array


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianDiffusion(Process):
  """A process of S steps, selected from an original process of T steps.

  In all methods t (B,) is an integer step in [0, S). The network receives the original
  timestep instead, `network_time(t)` in [0, T). Images are (B, H, W, C). Tables are
  float64 on the host and are cast to float32 when used.

  Attributes:
    betas: (S,) noise variances.
    timesteps: (S,) original timestep of each step.
    original_alphas_cumprod: (T,) cumulative products of 1 - beta of the original
      process.
    prediction: what the network's output means: "epsilon", "x0" or "v".
    variance: "learned_range" (2C output channels), "fixed_small" or "fixed_large".
    loss_weight: weight of the squared error: "none", or "min_snr" as in released MDTv2:
      min(SNR, gamma) / SNR for epsilon and v, min(SNR, gamma) for x0. The paper (Hang
      et al., arXiv 2303.09556) uses min(SNR, gamma) / (SNR + 1) for v.
    min_snr_gamma: gamma of "min_snr".
  """

  betas: np.ndarray
  timesteps: np.ndarray
  original_alphas_cumprod: np.ndarray
  prediction: str = "epsilon"
  variance: str = "learned_range"
  loss_weight: str = "none"
  min_snr_gamma: float = 5.0

  @classmethod
  def create(
    cls,
    schedule: str = "linear",
    num_timesteps: int = 1000,
    spacing: str = "",
    prediction: str = "epsilon",
    variance: str = "learned_range",
    loss_weight: str = "none",
    min_snr_gamma: float = 5.0,
  ) -> GaussianDiffusion:
    """Builds a process from named settings.

    Args:
      schedule, num_timesteps: the original process; see `schedules.make_betas`.
      spacing: which timesteps to keep. Either a string for
        `schedules.spaced_timesteps`, or a spacing of `schedules.solver_timesteps`
        followed by a number of steps, such as "uniform20", "log_snr20" or "karras20".
      prediction, variance, loss_weight, min_snr_gamma: see the attributes.

    Raises:
      SettingError: a name is unknown, a number is out of range, or the spacing is not
        possible.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("variance", variance, VARIANCES)
    check_choice("loss_weight", loss_weight, LOSS_WEIGHTS)
    if min_snr_gamma <= 0:
      raise SettingError("min_snr_gamma", min_snr_gamma, "must be above 0")
    original = np.cumprod(1 - make_betas(schedule, num_timesteps))
    return cls._on_timesteps(
      original,
      _chosen_timesteps(original, spacing),
      prediction=prediction,
      variance=variance,
      loss_weight=loss_weight,
      min_snr_gamma=min_snr_gamma,
    )

  @classmethod
  def _on_timesteps(
    cls, original: np.ndarray, timesteps: np.ndarray, **settings: Any
  ) -> GaussianDiffusion:
    """Builds the process that keeps only `timesteps` of the original process."""
    kept = original[timesteps]
    betas = 1 - kept / np.concatenate([[1.0], kept[:-1]])
    return cls(betas, timesteps, original, **settings)

  def respaced(self, spacing: str, num_steps: int) -> GaussianDiffusion:
    """Returns the process that keeps `num_steps` of the T original timesteps.

    Args:
      spacing: "uniform", "log_snr" or "karras", see `schedules.solver_timesteps`; ""
        for the even spacing of the released code, see `schedules.spaced_timesteps`.
      num_steps: S, in [1, T].

    Raises:
      SettingError: the spacing is not possible.
    """
    original = self.original_alphas_cumprod
    return self._on_timesteps(
      original,
      _chosen_timesteps(original, f"{spacing}{num_steps}"),
      prediction=self.prediction,
      variance=self.variance,
      loss_weight=self.loss_weight,
      min_snr_gamma=self.min_snr_gamma,
    )

  @property
  def num_timesteps(self) -> int:
    """S, number of steps of this process."""
    return len(self.betas)

  @property
  def num_original_timesteps(self) -> int:
    """T, number of steps of the original process."""
    return len(self.original_alphas_cumprod)

  @property
  def end_time(self) -> int:
    """S: steps t lie in [0, S)."""
    return self.num_timesteps

  @property
  def end_network_time(self) -> int:
    """T: original timesteps lie in [0, T)."""
    return self.num_original_timesteps

  @property
  def learns_variance(self) -> bool:
    """Whether the network predicts the variance."""
    return self.variance == "learned_range"

  @functools.cached_property
  def alphas_cumprod(self) -> np.ndarray:
    """(S,) cumulative products of 1 - beta: alpha^2 of each step."""
    return np.cumprod(1 - self.betas)

  @functools.cached_property
  def alphas_cumprod_prev(self) -> np.ndarray:
    """(S,) `alphas_cumprod` of the preceding step; 1 for step 0."""
    return np.concatenate([[1.0], self.alphas_cumprod[:-1]])

  @functools.cached_property
  def snr(self) -> np.ndarray:
    """(S,) signal-to-noise ratio of each step, alpha^2 / sigma^2."""
    return self.alphas_cumprod / (1 - self.alphas_cumprod)

  @functools.cached_property
  def posterior_variance(self) -> np.ndarray:
    """(S,) variance of q(x_{t-1} | x_t, x_0), DDPM equation 7."""
    return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

  @functools.cached_property
  def posterior_log_variance(self) -> np.ndarray:
    """(S,) log of `posterior_variance`; step 0, of variance 0, uses that of step 1."""
    floor = self.posterior_variance[min(1, self.num_timesteps - 1)]
    clipped = np.concatenate([[floor], self.posterior_variance[1:]])
    # In a process of one step the only variance is 0; `tiny` keeps its log finite.
    return np.log(np.maximum(clipped, np.finfo(np.float32).tiny))

  @functools.cached_property
  def posterior_mean_coef_x0(self) -> np.ndarray:
    """(S,) factor of x_0 in the mean of q(x_{t-1} | x_t, x_0), DDPM equation 7."""
    signal = np.sqrt(self.alphas_cumprod_prev)
    return self.betas * signal / (1 - self.alphas_cumprod)

  @functools.cached_property
  def posterior_mean_coef_xt(self) -> np.ndarray:
    """(S,) factor of x_t in the mean of q(x_{t-1} | x_t, x_0), DDPM equation 7."""
    noise = 1 - self.alphas_cumprod_prev
    return noise * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)

  @functools.cached_property
  def fixed_log_variance(self) -> np.ndarray:
    """(S,) log variance of p(x_{t-1} | x_t) if the variance is not learned."""
    if self.variance == "fixed_small":
      return self.posterior_log_variance
    # Step 0 uses the posterior variance, which gives the decoder a better likelihood.
    return np.concatenate([self.posterior_log_variance[:1], np.log(self.betas[1:])])

  def alpha(self, t: Array) -> Float[Array, " B"]:
    """Returns sqrt(alphas_cumprod[t]), the factor of the data."""
    return jnp.asarray(np.sqrt(self.alphas_cumprod), jnp.float32)[t]

  def sigma(self, t: Array) -> Float[Array, " B"]:
    """Returns sqrt(1 - alphas_cumprod[t]), the factor of the noise."""
    return jnp.asarray(np.sqrt(1 - self.alphas_cumprod), jnp.float32)[t]

  def weight(self, t: Array) -> Float[Array, " B"]:
    """Returns mse_weights[t], the weight of the squared error."""
    return jnp.asarray(self.mse_weights, jnp.float32)[t]

  def sample_t(self, key: Array, batch: int) -> Int[Array, " batch"]:
    """Draws steps uniformly from [0, S)."""
    return jax.random.randint(key, (batch,), 0, self.num_timesteps)

  def levels(self) -> Levels:
    """Returns the noise levels of the S steps, float64 on the host."""
    return Levels(
      np.sqrt(self.alphas_cumprod),
      np.sqrt(1 - self.alphas_cumprod),
      log_snr(self.alphas_cumprod),
    )

  def num_edit_steps(self, strength: float) -> int:
    """Number of steps up to the share `strength` of the original process."""
    limit = strength * (self.num_original_timesteps - 1)
    return int(np.count_nonzero(self.timesteps <= limit))

  def network_time(self, t: Array) -> Int[Array, " B"]:
    """Returns the original timesteps (B,) of steps t (B,)."""
    return jnp.asarray(self.timesteps, jnp.int32)[t]

  def q_sample(self, x0: Array, t: Array, noise: Array) -> Array:
    """Computes x_t of q(x_t | x_0) from the given noise, DDPM equation 4."""
    signal = _at(np.sqrt(self.alphas_cumprod), t, x0)
    sigma = _at(np.sqrt(1 - self.alphas_cumprod), t, x0)
    return signal * x0 + sigma * noise

  def q_posterior_mean(self, x0: Array, x_t: Array, t: Array) -> Array:
    """Computes the mean of q(x_{t-1} | x_t, x_0), DDPM equation 7."""
    from_x0 = _at(self.posterior_mean_coef_x0, t, x_t) * x0
    return from_x0 + _at(self.posterior_mean_coef_xt, t, x_t) * x_t

  def predict_x0(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes x0 from the network's output without variance channels."""
    if self.prediction == "x0":
      return output
    if self.prediction == "v":  # v = alpha epsilon - sigma x0 (arXiv 2202.00512)
      signal = _at(np.sqrt(self.alphas_cumprod), t, x_t)
      sigma = _at(np.sqrt(1 - self.alphas_cumprod), t, x_t)
      return signal * x_t - sigma * output
    scale = _at(np.sqrt(1 / self.alphas_cumprod), t, x_t)
    return scale * x_t - _at(np.sqrt(1 / self.alphas_cumprod - 1), t, x_t) * output

  def to_x0(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes x0 (B, H, W, C) from the network's output, (B, H, W, C or 2C).

    Raises:
      ValueError: the output has the wrong shape.
    """
    self._check_output(output, x_t)
    return self.predict_x0(output[..., : x_t.shape[-1]], x_t, t)

  def noise_from_x0(self, x0: Array, x_t: Array, t: Array) -> Array:
    """Computes the noise that leads from x0 to x_t; inverts `q_sample`."""
    scale = _at(np.sqrt(1 / self.alphas_cumprod), t, x_t)
    return (scale * x_t - x0) / _at(np.sqrt(1 / self.alphas_cumprod - 1), t, x_t)

  def p_mean_variance(
    self, model_output: Array, x_t: Array, t: Array, clip_denoised: bool = False
  ) -> Prediction:
    """Computes p(x_{t-1} | x_t) from the network's output.

    Args:
      model_output: (B, H, W, C), or (B, H, W, 2C) if the variance is learned.
      x_t: (B, H, W, C) noisy latents.
      t: (B,) steps.
      clip_denoised: whether to clip the predicted x0 to [-1, 1]; for pixels.

    Raises:
      ValueError: `model_output` has the wrong shape.
    """
    self._check_output(model_output, x_t)
    output, log_variance = model_output, _at(self.fixed_log_variance, t, x_t)
    if self.learns_variance:
      output, fraction = jnp.split(model_output, 2, axis=-1)
      # -1 means the posterior variance, 1 means beta (arXiv 2102.09672, equation 15).
      fraction = (fraction + 1) / 2
      low = _at(self.posterior_log_variance, t, x_t)
      high = _at(np.log(self.betas), t, x_t)
      log_variance = fraction * high + (1 - fraction) * low
    x0 = self.predict_x0(output, x_t, t)
    if clip_denoised:
      x0 = jnp.clip(x0, -1, 1)
    log_variance = jnp.broadcast_to(log_variance, x_t.shape)
    return Prediction(
      mean=self.q_posterior_mean(x0, x_t, t),
      variance=jnp.exp(log_variance),
      log_variance=log_variance,
      x0=x0,
    )

  def training_losses(
    self,
    model_output: Array,
    x0: Array,
    x_t: Array,
    t: Array,
    noise: Array,
    mean: Callable[[Array], Array] = mean_flat,
  ) -> dict[str, Array]:
    """Computes the losses of each sample.

    Args:
      model_output: (B, H, W, C or 2C).
      x0: (B, H, W, C) latents.
      x_t: (B, H, W, C), equal to `q_sample(x0, t, noise)`.
      t: (B,) steps.
      noise: (B, H, W, C) standard normal.
      mean: see `Process.training_losses`.

    Returns:
      name -> (B,) loss:
        "mse": the weighted squared error;
        "vb", only if the variance is learned: the variational bound in bits per
          dimension. Its gradient reaches only the variance channels;
        "loss": the sum, to be minimised.

    Raises:
      ValueError: `model_output` has the wrong shape.
    """
    self._check_output(model_output, x0)
    model_output = model_output.astype(jnp.float32)
    output = model_output[..., : x0.shape[-1]]
    mse = self.weight(t) * mean((self.target(x0, noise, t) - output) ** 2)
    losses = {"mse": mse, "loss": mse}
    if self.learns_variance:
      frozen = jnp.concatenate(
        [jax.lax.stop_gradient(output), model_output[..., x0.shape[-1] :]], axis=-1
      )
      losses["vb"], _ = self.variational_bound(frozen, x0, x_t, t, mean=mean)
      losses["loss"] = mse + losses["vb"]
    return losses

  def variational_bound(
    self,
    model_output: Array,
    x0: Array,
    x_t: Array,
    t: Array,
    clip_denoised: bool = False,
    mean: Callable[[Array], Array] = mean_flat,
  ) -> tuple[Array, Prediction]:
    """Computes the term of the variational bound at step t of each sample.

    The term is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). At step 0 the term is the
    negative log likelihood of x0 under a discretised Gaussian.

    Args:
      model_output, x0, x_t, t: as in `training_losses`.
      clip_denoised: as in `p_mean_variance`.
      mean: see `Process.training_losses`.

    Returns:
      (terms (B,) in bits per dimension, the prediction p).
    """
    p = self.p_mean_variance(model_output, x_t, t, clip_denoised)
    kl = normal_kl(
      self.q_posterior_mean(x0, x_t, t),
      _at(self.posterior_log_variance, t, x_t),
      p.mean,
      p.log_variance,
    )
    decoder_nll = -discretized_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
    nats = jnp.where(t == 0, mean(decoder_nll), mean(kl))
    return nats / np.log(2), p

  @functools.cached_property
  def mse_weights(self) -> np.ndarray:
    """(S,) weight of the squared error at each step; see `loss_weight`."""
    if self.loss_weight == "none":
      return np.ones_like(self.betas)
    weights = np.minimum(self.snr, self.min_snr_gamma)
    return weights if self.prediction == "x0" else weights / self.snr

  def target(self, x0: Array, noise: Array, t: Array) -> Array:
    """Returns the training target: x0, the noise, or v = alpha noise - sigma x0."""
    if self.prediction == "x0":
      return x0
    if self.prediction == "epsilon":
      return noise
    signal = _at(np.sqrt(self.alphas_cumprod), t, x0)
    return signal * noise - _at(np.sqrt(1 - self.alphas_cumprod), t, x0) * x0

  def _check_output(self, model_output: Array, x: Array) -> None:
    """Raises ValueError if the network's output has the wrong shape."""
    channels = x.shape[-1] * (2 if self.learns_variance else 1)
    if model_output.shape != (*x.shape[:-1], channels):
      raise ValueError(
        f"model output has shape {model_output.shape}; with input {x.shape} and "
        f"variance = {self.variance!r} it must be {(*x.shape[:-1], channels)}"
      )


PROCESSES["gaussian"] = GaussianDiffusion.create


def _chosen_timesteps(alphas_cumprod: np.ndarray, spacing: str) -> np.ndarray:
  """Returns the timesteps that a spacing such as "", "250" or "karras20" keeps."""
  named = re.fullmatch(rf"({'|'.join(SPACINGS)})(\d+)", spacing)
  if named:
    return solver_timesteps(alphas_cumprod, named[1], int(named[2]))
  return spaced_timesteps(len(alphas_cumprod), spacing)


def _at(table: np.ndarray, t: Array, like: Array) -> Array:
  """Returns table[t] in float32, as (B, 1, 1, 1) to broadcast against `like`."""
  values = jnp.asarray(table, jnp.float32)[t]
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
