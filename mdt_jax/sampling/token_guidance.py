"""Guidance by passes that see a part of the tokens, or by a weak network.

Sparse guidance (arXiv 2601.01608) guides a pass with many tokens by a pass with few
tokens; both have the condition. Path-drop guidance (SPRINT, arXiv 2510.21986) leaves
out all tokens of the weak pass. Autoguidance (arXiv 2406.02507) takes a worse network
for the weak pass, such as an earlier checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mdt_jax.diffusion.guidance import Guidance, ModelFn
from mdt_jax.diffusion.runge_kutta import RUNGE_KUTTA
from mdt_jax.diffusion.samplers import Sampler
from mdt_jax.errors import SettingError
from mdt_jax.models.flops import forward_flops
from mdt_jax.models.registry import Model
from mdt_jax.types import Array, Params

MASK_STREAM = 2  # folded into the key of an image, for its token masks
# (t (B,), whether the pass is the weak one) -> (B, L) uniform noise of a token mask
MaskNoise: TypeAlias = Callable[[Array, bool], Float[Array, "B L"]]


class Pair(NamedTuple):
  """The parameters of two networks, as `Generator` receives them.

  Attributes:
    strong: parameters of the network that is sampled.
    weak: parameters of the network of the weak pass.
  """

  strong: Params
  weak: Params


def needs_passes(guidance: Guidance, weak_model: Model | None) -> bool:
  """Whether guidance is other than classifier-free guidance with all tokens."""
  tokens = guidance.tokens
  return weak_model is not None or not tokens.are_all or tokens.weak_condition != "null"


def check_tokens(model: Model, guidance: Guidance, weak_model: Model | None) -> None:
  """Raises SettingError if the networks cannot run the passes of guidance.

  Args:
    model: the network that is sampled.
    guidance: settings of guidance.
    weak_model: network of the weak pass; None for `model`.
  """
  tokens, is_guided = guidance.tokens, guidance.scale != 1
  for name, ratio, network in (
    ("strong_ratio", tokens.strong, model),
    ("weak_ratio", tokens.weak, weak_model or model),
  ):
    if ratio == 0 or (name == "weak_ratio" and not is_guided):
      continue
    kind = getattr(network, "variant", type(network).__name__)
    setting = f"config.sampling.{name}"
    if not (network.takes_mask or network.has_route):
      accepted = f"must be 0: {kind} cannot predict tokens that a pass leaves out"
      raise SettingError(setting, ratio, accepted)
    if ratio == 1 and not network.drops_path:
      accepted = f"must be below 1: {kind} has no path to drop"
      raise SettingError(setting, ratio, accepted)
    if ratio < 1 and network.num_kept(ratio) < 1:
      accepted = f"must keep at least 1 of the {network.num_tokens} tokens"
      raise SettingError(setting, ratio, accepted)
  if tokens.schedule != "constant" and tokens.are_all:
    accepted = "needs a weak_ratio or a strong_ratio above 0"
    raise SettingError("config.sampling.ratio_schedule", tokens.schedule, accepted)
  is_same = tokens.weak_condition == "same" and is_guided
  are_equal = tokens.are_all or (
    tokens.schedule == "constant" and tokens.strong == tokens.weak
  )
  if is_same and weak_model is None and are_equal:
    raise SettingError(
      "config.sampling.weak_condition",
      "same",
      "needs a weak_ratio above strong_ratio, or a weak_checkpoint: both passes would "
      "be the same",
    )


def make_model_fn(
  model: Model,
  params: Params | Pair,
  labels: Array,
  null_labels: Array,
  sampler: Sampler,
  mask_noise: MaskNoise,
  weak_model: Model | None = None,
) -> ModelFn:
  """Builds the guided function of a sampler from a strong and a weak pass.

  Args:
    model: the network.
    params: its parameters; a `Pair` if there is a weak network.
    labels: (B, …) conditions to sample.
    null_labels: null conditions; ignored if the weak pass has the same condition.
    sampler: guidance and its shares of tokens.
    mask_noise: draws the noise of the token masks.
    weak_model: network of the weak pass; None for `model`.
  """
  guidance = sampler.guidance
  strong_params, weak_params = params if isinstance(params, Pair) else (params, params)
  is_null = guidance.tokens.weak_condition == "null"
  weak_labels = null_labels if is_null else labels
  strong = _pass(model, strong_params, labels, guidance, mask_noise, is_weak=False)
  weak = _pass(
    weak_model or model, weak_params, weak_labels, guidance, mask_noise, is_weak=True
  )
  return guidance.combine(strong, lambda x, t: (strong(x, t), weak(x, t)))


def _pass(
  model: Model,
  params: Params,
  labels: Array,
  guidance: Guidance,
  mask_noise: MaskNoise,
  *,
  is_weak: bool,
) -> ModelFn:
  """One pass of guidance: (x (B, H, W, C), t (B,)) -> output."""

  def keeping(num_keep: int) -> ModelFn:
    def run(x: Array, t: Array) -> Array:
      mask = None
      if num_keep < model.num_tokens:
        mask = model.token_mask(mask_noise(t, is_weak), num_keep)
      return cast("Array", model.apply({"params": params}, x, t, labels, mask))

    return run

  ratios = guidance.tokens.ratios(is_weak)
  passes = [keeping(model.num_kept(ratio)) for ratio in ratios]
  if len(passes) == 1:
    return passes[0]

  def scheduled(x: Array, t: Array) -> Array:
    # A sampler uses the same time for all samples.
    index = guidance.tokens.choose(guidance.noise_share(t[0]), is_weak)
    return jax.lax.switch(index, passes, x, t)

  return scheduled


def draw_mask_noise(keys: Array, length: int) -> MaskNoise:
  """Returns a function that draws mask noise from the keys of images.

  The noise of an image depends on its key, the time and the pass alone.

  Args:
    keys: (B,) random keys, one per image.
    length: L, number of tokens.
  """

  def draw(t: Array, is_weak: bool) -> Float[Array, "B L"]:
    bits = jax.lax.bitcast_convert_type(t.astype(jnp.float32), jnp.uint32)

    def of_image(key: Array, time: Array) -> Array:
      key = jax.random.fold_in(jax.random.fold_in(key, MASK_STREAM), time)
      return jax.random.uniform(jax.random.fold_in(key, int(is_weak)), (length,))

    return jax.vmap(of_image)(keys, bits)

  return draw


def sampling_flops(
  model: Model, sampler: Sampler, weak_model: Model | None = None
) -> float:
  """Counts the operations of drawing an image; see `models.flops`.

  Outside of the guidance interval there is no weak pass. The shares of a schedule are
  those at the times of the sampler's steps; a sampler with several calls a step counts
  the shares of a step for all of them.

  Args:
    model: the network.
    sampler: process, method and guidance.
    weak_model: network of the weak pass; None for `model`.
  """
  guidance, process = sampler.guidance, sampler.process
  # The last time of an ODE solver only ends a step.
  first = int(sampler.method in RUNGE_KUTTA)
  steps = jnp.arange(first, process.levels().alpha.size)
  times = process.network_time(steps)
  share = guidance.noise_share(times)
  total = _pass_flops(model, guidance, share, is_weak=False).sum()
  if guidance.scale != 1:
    guided = guidance.is_guided(times)
    weak = _pass_flops(weak_model or model, guidance, share, is_weak=True)
    total += jnp.where(guided, weak, 0).sum()
  return float(total) * sampler.calls_a_pass / steps.size


def _pass_flops(
  model: Model, guidance: Guidance, noise_share: Array, *, is_weak: bool
) -> Array:
  """Operations of a pass at each of the given shares of the process."""
  flops = []
  for ratio in guidance.tokens.ratios(is_weak):
    num_keep = model.num_kept(ratio)
    kept = num_keep if num_keep < model.num_tokens else None
    flops.append(forward_flops(model, kept))
  if len(flops) == 1:
    return jnp.full(noise_share.shape, float(flops[0]))
  index = guidance.tokens.choose(noise_share, is_weak)
  return jnp.asarray(flops, jnp.float32)[index]
