"""Runs a sampling job one network call at a time, with a preview after each call.

`SamplingJob.generate_blocks` compiles the whole loop of a sampler, so that it compiles
anew for other numbers of steps and other guidance scales. `Stepper` compiles the
network alone. The guidance scale is an input of this program. Other steps, samplers and
seeds reuse the program.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from mdt_jax.diffusion.guidance import Guidance, guide, noise_above
from mdt_jax.diffusion.loops import Hold, Loop, make_loop, step_noise
from mdt_jax.diffusion.samplers import Sampler
from mdt_jax.models.masking import token_mask_from_noise
from mdt_jax.models.registry import Model
from mdt_jax.sampling.generator import (
  Drawn,
  Given,
  Task,
  draw_noise,
  keep_visible,
  make_start,
  output_shape,
  weak_condition,
)
from mdt_jax.sampling.job import SamplingJob
from mdt_jax.sampling.token_guidance import (
  Pair,
  draw_mask_noise,
  make_model_fn,
  needs_passes,
)
from mdt_jax.types import Array, Params

MAX_PROGRAMS = 8  # of each kind, that a Stepper keeps
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """The state of a block of images after a network call.

  Attributes:
    call: number of network calls so far, from 1.
    calls: number of network calls in all.
    x0: (B, H, W, C) the network's current prediction of the latents without noise.
  """

  call: int
  calls: int
  x0: Float[Array, "B H W C"]


class Stepper:
  """Runs jobs of one pipeline on one device, one network call at a time.

  The images equal those of `SamplingJob.generate_blocks` up to rounding. Two threads
  may run two jobs: the programs are shared, and the steps take turns.

  Args:
    device: device that draws; None for the first one.
    unroll: replaces the `unroll` of the network; 1 compiles fastest. None: that of the
      network.
  """

  def __init__(self, device: Any = None, unroll: int | None = None):
    self._unroll = unroll
    self._device = device or jax.local_devices()[0]
    self._loops: Recent[_LoopPrograms] = Recent()
    self._networks: Recent[Callable[..., Array]] = Recent()
    self._decodes: Recent[Callable[..., Array]] = Recent()
    self._params: Recent[Any] = Recent(3)

  def run(self, job: SamplingJob, block: int = 0) -> Iterator[Step]:
    """Yields each step of a block of a job; returns its latents (B, H, W, C).

    Use `latents = yield from stepper.run(job)`. Closing the iterator stops the job.

    Args:
      job: job of a sampler with separate steps; see `loops.make_loop`.
      block: number of the block.

    Raises:
      SettingError: the sampler has no separate steps.
    """
    sampler, shape = job.experiment.sampler, output_shape(job.experiment.model)
    labels, ids, given = job.request.inputs([block])
    ids, seed, given = self._put((ids, np.uint32(job.request.seed), given))
    labels = self._put(labels)
    programs = self._loops.get(_loop_key(job, len(ids)), lambda: _LoopPrograms(job))
    drawn = _draw_noise(shape, ids, seed)
    call_network = self._network_calls(
      job, sampler, programs.times, labels, drawn.keys, given
    )
    steps, last = programs.steps, len(programs.steps) - 1
    state, at = programs.begin(drawn, programs.hold_noise(drawn, steps[0]), given)
    for i in range(len(steps)):
      output = call_network(i, at)
      noise = programs.noise(drawn, steps[i])
      held = programs.hold_noise(drawn, steps[min(i + 1, last)])
      inputs = np.int32(i), noise, drawn, held, given
      state, x0, at = programs.advance(state, at, output, *inputs)
      yield Step(i + 1, len(steps), x0)
    return programs.finish(state, given)

  def decode(
    self, job: SamplingJob, latents: Float[Array, "B H W C"]
  ) -> Shaped[np.ndarray, "B H W C"]:
    """Turns latents into uint8 images, or returns the latents of a latent network."""
    has_decoder = job.autoencoder is not None
    decode = self._decodes.get(has_decoder, lambda: jax.jit(job.make_decode()))
    params = self.place(job.autoencoder.params) if job.autoencoder else {}
    return np.asarray(decode(params, latents))

  def _network_calls(
    self,
    job: SamplingJob,
    sampler: Sampler,
    times: np.ndarray,
    labels: Array,
    keys: Array,
    given: Given,
  ) -> Callable[[int, tuple[Array, Array, Array]], Array]:
    """Returns (number of a call, (x, steps, times)) -> guided output of the network."""
    model, guidance, task = job.experiment.model, sampler.guidance, job.task
    if self._unroll is not None:
      model = model.clone(unroll=self._unroll)
    null = weak_condition(model, guidance, labels, given)
    if needs_passes(guidance, job.weak.model if job.weak else None):
      # These passes have static numbers of tokens, so each setting has its program.
      weak = job.weak
      key = (repr(guidance), repr(weak.model) if weak else None, labels.shape)
      passes = self._networks.get(key, lambda: _passes_program(job, model))
      params = self.place(job.params)
      both = Pair(params, self.place(weak.params)) if weak else params
      return lambda i, at: passes(both, at[0], at[2], labels, null, keys)
    params = self.place(job.params)
    scales = np.asarray(guidance.scale_at(jnp.asarray(times)), np.float32)
    in_interval = np.asarray(guidance.is_guided(jnp.asarray(times)))
    interpolates = _interpolates(guidance, task, times)

    def call(i: int, at: tuple[Array, Array, Array]) -> Array:
      guided = guidance.scale != 1 and in_interval[i]
      keep = task.num_keep if interpolates[i] else None
      key = (guided, keep, guidance.channels, labels.shape)
      network = self._networks.get(
        key, lambda: _network_program(model, guidance.channels, guided, keep)
      )
      hidden = given["hidden_tokens"] if interpolates[i] else None
      return network(params, at[0], at[2], labels, null, scales[i], hidden)

    return call

  def place(self, params: Params) -> Params:
    """Returns parameters on the device; the last few stay there."""
    placed = self._params.get(id(params), lambda: (params, self._put(params)))
    return placed[1]

  def _put(self, tree: Any) -> Any:
    return jax.device_put(tree, self._device)


_draw_noise = jax.jit(draw_noise, static_argnums=0)
_step_noise = jax.jit(step_noise, static_argnums=2)


class _LoopPrograms:
  """The compiled arithmetic of a sampler around the network's calls.

  The noise is an input: programs with random numbers take long to compile.

  Attributes:
    steps: (E,) step of the process at each call.
    times: (E,) times that the network receives at each call.
    begin: (drawn, noise of the held part, given) -> (state, (x, steps, times) of the
      first call).
    advance: (state, (x, steps, times), output, number of the call, noise, drawn, noise
      of the held part at the next call, given) -> (state, x0, (x, steps, times) of the
      next call).
    finish: (state, given) -> latents.
  """

  def __init__(self, job: SamplingJob):
    sampler, task = job.experiment.sampler, job.task
    process, shape = sampler.process, output_shape(job.experiment.model)
    self._is_random = sampler.is_random
    self._repeats = task.repeats > 1
    self._holds = task.kind == "inpaint"

    def loop_of(drawn: Drawn, held: Array | None, given: Given) -> Loop:
      start, hold = make_start(sampler, task, drawn, given, held)
      return _make_loop(sampler, task, start, drawn.step_keys, hold)

    def prepare(loop: Loop, state: Any, i: Array) -> tuple[Array, Array, Array]:
      x, t = loop.prepare(state, _row(loop, i, None))
      return x, t, process.network_time(t)

    @jax.jit
    def begin(drawn: Drawn, held: Array | None, given: Given) -> Any:
      loop = loop_of(drawn, held, given)
      return loop.state, prepare(loop, loop.state, jnp.int32(0))

    @jax.jit
    def advance(
      state: Any,
      at: tuple[Array, Array, Array],
      output: Array,
      i: Array,
      noise: Array | None,
      drawn: Drawn,
      held: Array | None,
      given: Given,
    ) -> Any:
      loop = loop_of(drawn, held, given)
      output = output.astype(jnp.float32)
      state, x0 = loop.update(state, _row(loop, i, noise), at[0], at[1], output)
      following = jnp.minimum(i + 1, len(loop.steps) - 1)
      return state, x0, prepare(loop, state, following)

    self.begin, self.advance = begin, advance
    # The latent is the first leaf of every state.
    self.finish = jax.jit(
      lambda state, given: keep_visible(task, jax.tree.leaves(state)[0], given)
    )
    nothing = jnp.zeros((1, *shape))
    self.steps = _make_loop(sampler, task, nothing, jnp.zeros(0), None).steps
    self.times = np.asarray(process.network_time(jnp.asarray(self.steps)))

  def noise(self, drawn: Drawn, step: np.ndarray) -> Array | None:
    """The noise that a call adds; None for repeated steps, which draw their own."""
    if self._repeats:
      return None
    if not self._is_random:
      return drawn.noise  # has the weight 0
    return _step_noise(drawn.step_keys, step, drawn.noise.shape)

  def hold_noise(self, drawn: Drawn, step: np.ndarray) -> Array | None:
    """The noise of the held part at a step of a random sampler."""
    if not (self._holds and self._is_random):
      return None
    return _step_noise(drawn.hold_keys, step, drawn.noise.shape)


def _make_loop(
  sampler: Sampler, task: Task, start: Array, keys: Array, hold: Hold | None
) -> Loop:
  """Returns the loop of a sampler for a task."""
  edits = task.kind == "edit"
  return make_loop(
    sampler.process,
    start,
    keys,
    method=sampler.method,
    eta=sampler.eta,
    clip_denoised=sampler.clip_denoised,
    num_steps=sampler.process.num_edit_steps(task.strength) if edits else None,
    hold=hold,
    repeats=task.repeats,
  )


def _row(loop: Loop, i: Array, noise: Array | None) -> tuple[Any, ...]:
  """Returns row i of the loop, with the given noise."""
  rows = jax.tree.map(lambda rows: jnp.asarray(rows)[i], loop.rows[:-1])
  return (*rows, noise)


def _interpolates(guidance: Guidance, task: Task, times: np.ndarray) -> np.ndarray:
  """Whether the side-interpolater predicts the hidden tokens at each call (E,)."""
  share = task.interpolation
  if share == 0:
    return np.zeros(len(times), bool)
  t = jnp.asarray(times)
  span = guidance.num_timesteps, guidance.clean_time
  return np.asarray(noise_above(t, 1 - share, *span) >= 0)


def _network_program(
  model: Model, channels: int | None, guided: bool, num_keep: int | None
) -> Callable[..., Array]:
  """Compiles a call of the network, with classifier-free guidance if `guided`.

  Args:
    model: the network.
    channels: number of leading channels to guide; None for all.
    guided: whether there is a pass with the null label.
    num_keep: number of tokens that the encoder sees; None for all.
  """
  # One batch of both passes is slower on CPUs; see `guidance.guided`.
  one_batch = jax.default_backend() != "cpu" or model.unroll == 1
  count = model.in_channels if channels is None else min(channels, model.in_channels)

  @jax.jit
  def call(
    params: Params,
    x: Array,
    t: Array,
    labels: Array,
    null: Array,
    scale: Array,
    hidden_tokens: Array | None,
  ) -> Array:
    mask = None
    if num_keep is not None and hidden_tokens is not None:
      mask = token_mask_from_noise(hidden_tokens[None], num_keep)

    def network(x: Array, t: Array, y: Array) -> Array:
      rows = mask and jax.tree.map(
        lambda a: jnp.broadcast_to(a, (len(x), a.shape[1])), mask
      )
      return cast("Array", model.apply({"params": params}, x, t, y, rows))

    if not guided:
      return network(x, t, labels)
    if one_batch:
      pairs = ((x, x), (t, t), (labels, null))
      strong, weak = jnp.split(network(*map(jnp.concatenate, pairs)), 2)
    else:
      strong, weak = network(x, t, labels), network(x, t, null)
    return guide(strong, weak, jnp.broadcast_to(scale, (len(x),)), count)

  return call


def _passes_program(job: SamplingJob, model: Model) -> Callable[..., Array]:
  """Compiles a call of guidance by fewer tokens or by a weak network."""
  sampler, weak = job.experiment.sampler, job.weak

  @jax.jit
  def call(
    params: Params | Pair,
    x: Array,
    t: Array,
    labels: Array,
    null: Array,
    keys: Array,
  ) -> Array:
    noise_of = draw_mask_noise(keys, model.num_tokens)
    weak_model = weak.model if weak else None
    return make_model_fn(model, params, labels, null, sampler, noise_of, weak_model)(
      x, t
    )

  return call


def _loop_key(job: SamplingJob, batch: int) -> Hashable:
  """What the arithmetic of a sampler depends on, beyond the network's output."""
  s = job.experiment.settings.sampling
  method = (s.method, repr(s.arguments), s.num_steps, s.spacing, s.eta, s.clip_denoised)
  task = dataclasses.replace(job.task, interpolation=0.0, num_keep=0)
  return (method, task, batch)


class Recent(Generic[T]):
  """A cache of the values that were used last."""

  def __init__(self, size: int = MAX_PROGRAMS):
    self._size = size
    self._values: collections.OrderedDict[Hashable, T] = collections.OrderedDict()
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._values)

  def get(self, key: Hashable, make: Callable[[], T]) -> T:
    """Returns the value of a key, which `make` makes if it is missing."""
    with self._lock:
      if key not in self._values:
        self._values[key] = make()
        if len(self._values) > self._size:
          self._values.popitem(last=False)
      self._values.move_to_end(key)
      return self._values[key]
