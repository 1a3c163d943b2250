"""The training step: an unmasked and a masked pass over the same latents.

Every random number of a step derives from (seed, step) and is drawn for the whole
batch at once, so that a step can be replayed, and comes out the same on any number
of devices and in any number of accumulated parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.timestep_samplers import LossHistory, TimestepSampler
from mdt_jax.models.embeddings import drop_labels
from mdt_jax.models.masking import token_mask_from_noise
from mdt_jax.models.mdt import MDT
from mdt_jax.train_state import Params, TrainState

Array = jax.Array
# Name -> (2,) float32: a sum over samples and their number, so that metrics of
# several steps add up.
Metrics = dict[str, Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]

NUM_QUARTILES = 4


@flax.struct.dataclass
class Draws:
  """Samples of a batch with all that is random about them; the first axis is B.

  Attributes:
    x0: (B, H, W, C) latents.
    t: (B,) int32 steps of the diffusion, the same in both passes.
    weights: (B,) of the losses, from the timestep sampler.
    noise: (B, 2, H, W, C), of the unmasked and the masked pass.
    labels: (B, 2) after label dropout, likewise.
    mask_noise: (B, L) uniform; the largest are masked.
  """

  x0: Array
  t: Array
  weights: Array
  noise: Array
  labels: Array
  mask_noise: Array


def draw(
  key: Array,
  batch: dict[str, Array],
  model: MDT,
  timestep_sampler: TimestepSampler,
  loss_history: LossHistory | None,
) -> Draws:
  """Draws timesteps, noise, dropped labels and masks for a batch.

  Args:
    key: random key of the step.
    batch: what `draw_images` takes, and "label" (B,) int32.
    model: for its classes, label dropout and number of tokens.
    timestep_sampler: draws the timesteps.
    loss_history: its state.
  """
  labels, size = batch["label"], batch["label"].shape[0]
  t_key, noise_key, label_key, mask_key, latent_key = jax.random.split(key, 5)
  x0 = draw_images(latent_key, batch)
  t, weights = timestep_sampler.sample(t_key, size, loss_history)
  return Draws(
    x0=x0,
    t=t,
    weights=weights,
    noise=jax.random.normal(noise_key, (size, 2, *x0.shape[1:])),
    labels=drop_labels(
      label_key,
      jnp.stack([labels, labels], axis=1),
      model.num_classes,
      model.label_dropout,
    ),
    mask_noise=jax.random.uniform(mask_key, (size, model.num_tokens)),
  )


def draw_images(key: Array, batch: dict[str, Array]) -> Array:
  """x0 (B, H, W, C) float32: "image", or a draw from the posterior of latents.

  Args:
    key: random key of the draw.
    batch: "image" (B, H, W, C) float32, or "moments" (B, 2, H, W, C), mean and
      deviation of each latent, of any float type.
  """
  if "image" in batch:
    return batch["image"]
  mean, deviation = jnp.unstack(batch["moments"].astype(jnp.float32), axis=1)
  return mean + deviation * jax.random.normal(key, mean.shape)


def pass_losses(
  model: MDT,
  diffusion: GaussianDiffusion,
  params: Params,
  draws: Draws,
  num_keep: int | None,
) -> dict[str, Array]:
  """Losses (B,) of the unmasked pass, or of the masked one with `num_keep`."""
  which = 0 if num_keep is None else 1
  noise = draws.noise[:, which]
  mask = None
  if num_keep is not None:
    mask = token_mask_from_noise(draws.mask_noise, num_keep)
  x_t = diffusion.q_sample(draws.x0, draws.t, noise)
  output = model.apply(
    {"params": params},
    x_t,
    diffusion.model_timesteps(draws.t),
    draws.labels[:, which],
    mask,
  )
  return diffusion.training_losses(output, draws.x0, x_t, draws.t, noise)


def step_loss(
  model: MDT,
  diffusion: GaussianDiffusion,
  params: Params,
  draws: Draws,
  num_keep: int | None,
) -> tuple[Array, tuple[dict[str, Array], Array]]:
  """The loss that a step descends, of both passes.

  Returns:
    (loss (), (losses, total)): `losses` (B,) of each pass by name, with the weights of
    the timestep sampler; `total` (B,) of both passes without, for it to learn from.
  """
  losses = pass_losses(model, diffusion, params, draws, None)
  total = losses["loss"]
  if num_keep is not None:
    masked = pass_losses(model, diffusion, params, draws, num_keep)
    total = total + masked["loss"]
    losses |= {f"masked_{name}": loss for name, loss in masked.items()}
  losses = {name: loss * draws.weights for name, loss in losses.items()}
  return (total * draws.weights).mean(), (losses, total)


def make_train_step(
  model: MDT,
  diffusion: GaussianDiffusion,
  optimizer: optax.GradientTransformation,
  timestep_sampler: TimestepSampler,
  *,
  seed: int,
  ema_decays: Iterable[float],
  accumulation_steps: int = 1,
  learning_rate: Callable[[Array], Array] | None = None,
) -> TrainStep:
  """Builds the step, to be jitted with `num_keep` static and the state donated.

  Args:
    model: the network.
    diffusion: the process, not respaced.
    optimizer: turns gradients into updates.
    timestep_sampler: draws the timesteps.
    seed: of all random draws, with the step.
    ema_decays: decays of the averages in the state.
    accumulation_steps: parts of the batch, one after another; less memory.
    learning_rate: schedule, only to report it.

  Returns:
    (state, batch, num_keep) -> (state, metrics), where num_keep is the number of
    tokens of the masked pass, or None for no masked pass. A step whose loss or gradient
    is not finite changes the step number alone; the metric "skipped" counts it, and the
    others leave it out.
  """

  def gradients_of(
    params: Params, draws: Draws, num_keep: int | None
  ) -> tuple[Params, dict[str, Array], Array]:
    grad_fn = jax.grad(functools.partial(step_loss, model, diffusion), has_aux=True)
    if accumulation_steps == 1:
      gradients, (losses, total) = grad_fn(params, draws, num_keep)
      return gradients, losses, total

    def body(total_gradients: Params, part: Draws):
      gradients, aux = grad_fn(params, part, num_keep)
      return jax.tree.map(jnp.add, total_gradients, gradients), aux

    zeros = jax.tree.map(jnp.zeros_like, params)
    parts = jax.tree.map(lambda x: _split(x, accumulation_steps), draws)
    gradients, aux = jax.lax.scan(body, zeros, parts)
    gradients = jax.tree.map(lambda g: g / accumulation_steps, gradients)
    losses, total = jax.tree.map(_join, aux)
    return gradients, losses, total

  def train_step(
    state: TrainState, batch: dict[str, Array], num_keep: int | None
  ) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    draws = draw(key, batch, model, timestep_sampler, state.loss_history)
    gradients, losses, total = gradients_of(state.params, draws, num_keep)
    metrics = _loss_metrics(losses, draws.t, diffusion.num_timesteps)
    trained = {k: g for k, g in gradients.items() if k not in model.frozen}
    norm = optax.tree.norm(trained)
    metrics["gradient_norm"] = jnp.stack([norm, 1.0])
    if learning_rate is not None:
      metrics["learning_rate"] = jnp.stack([learning_rate(state.step), 1.0])
    finite = jnp.isfinite(total.mean()) & jnp.isfinite(norm)
    metrics = {name: jnp.where(finite, value, 0) for name, value in metrics.items()}
    metrics["skipped"] = jnp.stack([1.0 - finite, 1.0])

    def update(state: TrainState) -> TrainState:
      updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      return state.replace(
        params=params,
        opt_state=opt_state,
        ema={
          str(decay): optax.incremental_update(params, state.ema[str(decay)], 1 - decay)
          for decay in ema_decays
        },
        loss_history=timestep_sampler.update(state.loss_history, draws.t, total),
      )

    # A branch, not a choice for each number: nothing of the old state outlives the
    # update, so that XLA writes the new one over it, without copies.
    state = jax.lax.cond(finite, update, lambda state: state, state)
    return state.replace(step=state.step + 1), metrics

  return train_step


def add_metrics(first: Metrics, second: Metrics) -> Metrics:
  """Metrics over the samples of both."""
  return jax.tree.map(jnp.add, first, second)


def mean_metrics(metrics: Metrics) -> dict[str, float]:
  """Means over the samples, on the host; a quartile without samples is left out."""
  host = jax.device_get(metrics)
  return {name: float(s / n) for name, (s, n) in host.items() if n > 0}


def _loss_metrics(losses: dict[str, Array], t: Array, num_timesteps: int) -> Metrics:
  quartile = NUM_QUARTILES * t // num_timesteps
  metrics = {}
  for name, loss in losses.items():
    metrics[name] = jnp.stack([loss.sum(), jnp.float32(loss.shape[0])])
    if not name.endswith("loss"):
      continue
    for q in range(NUM_QUARTILES):
      inside = (quartile == q).astype(jnp.float32)
      metrics[f"{name}_q{q}"] = jnp.stack([(loss * inside).sum(), inside.sum()])
  return metrics


def _split(x: Array, parts: int) -> Array:
  """(B, …) -> (parts, B / parts, …): part i holds every parts-th sample from i.

  Neighbouring samples, which lie on one device, go to different parts, so that each
  part is spread over the devices as the batch is.
  """
  return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array) -> Array:
  """The inverse of `_split`."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
