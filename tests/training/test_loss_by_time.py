"""The loss by diffusion time: sums of a step, means of a run, charts and files."""

from __future__ import annotations

import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util.tensor_util import make_ndarray

from mdt_jax import sharding
from mdt_jax.experiment import build
from mdt_jax.training import loop
from mdt_jax.training.events import Events
from mdt_jax.training.loss_by_time import NUM_TIME_BINS, LossByTime, draw_chart
from mdt_jax.training.metric_lines import read_lines
from mdt_jax.training.program import make_program
from mdt_jax.training.step import LOSS_BY_TIME, add_metrics, mean_metrics, step_key
from tests import forked
from tests.training.test_step import make_batch
from tests.training.tiny import tiny_config, tiny_dit_config

EVERY = "log.loss_by_time_every"
FLOW = {"model.name": "SiT-S/2", "diffusion.process": "flow"}
RUNS = {
  "dit": {"model.name": "DiT-S/2"},
  "mdt": {"model.name": "MDT-S/2", "optimizer.name": "adamw"},
  "parts": {"model.name": "DiT-S/2", "accumulation_steps": 2},
  "importance": {"model.name": "DiT-S/2", "timestep_sampler": "loss-second-moment"},
  "flow": {**FLOW, "sampling.method": "ode_euler"},
}


def history_of(experiment, state):
  """A loss history that makes importance sampling draw some times more often."""
  if state.loss_history is None:
    return None
  losses = np.random.default_rng(0).uniform(0.1, 2, state.loss_history.losses.shape)
  return state.loss_history.replace(
    losses=jnp.asarray(losses, jnp.float32),
    counts=jnp.full(len(losses), 10, jnp.int32),
  )


def step_of(settings):
  """(experiment, state, static, batch, new state, metrics) of one step of a program.

  All devices of the process take part.
  """
  config = tiny_config(batch_size=16, **{EVERY: 1000}, **settings)
  experiment = build(config)
  program = make_program(experiment)
  static = experiment.objective.choose_static(0, 0)
  batch = make_batch(config)
  with sharding.use_mesh(experiment.mesh):
    state = program.init(jax.random.key(3))
    state = state.replace(loss_history=history_of(experiment, state))
    params = jax.tree.map(np.asarray, state.params)
    history = jax.tree.map(np.asarray, state.loss_history)
    placed = sharding.put_batch(batch, experiment.mesh, 16)
    _, metrics = program.step(state, placed, static)
  return experiment, params, history, static, batch, jax.device_get(metrics)


def expected_means(experiment, params, history, static, batch):
  """The means by NumPy, from the losses and times of the samples of the batch."""
  objective = experiment.objective
  draws = objective.draw(step_key(0, jnp.int32(0)), batch, history)
  loss = jax.jit(lambda p: objective.loss(experiment.model.apply, p, draws, static)[1])
  losses = np.asarray(loss(params)["total"], np.float64)
  t, weights = np.asarray(draws.t, np.float64), np.asarray(draws.weights, np.float64)
  edges = np.linspace(0, experiment.process.end_time, NUM_TIME_BINS + 1)
  bins = np.digitize(t, edges) - 1
  means = np.full(NUM_TIME_BINS, np.nan)
  for number in set(bins.tolist()):
    inside = bins == number
    means[number] = np.average(losses[inside], weights=weights[inside])
  return means


def assert_step_agrees(name):
  experiment, params, history, static, batch, metrics = step_of(RUNS[name])
  expected = expected_means(experiment, params, history, static, batch)
  sums, weights = metrics[LOSS_BY_TIME]
  np.testing.assert_array_equal(weights > 0, np.isfinite(expected))
  filled = weights > 0
  assert 4 <= filled.sum() < NUM_TIME_BINS or filled.all()
  found = sums[filled] / weights[filled]
  np.testing.assert_allclose(found, expected[filled], rtol=2e-5)
  assert np.ptp(found) > 1e-3  # a wrong bin would be seen


@pytest.mark.parametrize("name", RUNS)
def test_means_of_a_step_equal_those_by_numpy(name):
  assert_step_agrees(name)


def check_on_four_devices():
  """Runs in a process of its own."""
  assert jax.device_count() == 4
  for name in ("dit", "parts"):
    assert_step_agrees(name)
  sys.exit(0)


def test_means_of_a_step_on_four_devices_equal_those_by_numpy():
  process = forked.Forked(check_on_four_devices, num_devices=4)
  assert process.end() == 0, process.err


def test_bins_change_no_bit_of_a_step(monkeypatch):
  digests = []
  for every in (0, 1000):
    config = tiny_dit_config(**{EVERY: every})
    experiment = build(config)
    program = make_program(experiment)
    with sharding.use_mesh(experiment.mesh):
      state = program.init(jax.random.key(3))
      placed = sharding.put_batch(make_batch(config), experiment.mesh, 8)
      state, metrics = program.step(state, placed, None)
    assert (LOSS_BY_TIME in metrics) == bool(every)
    metrics.pop(LOSS_BY_TIME, None)
    digests.append(
      [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state, metrics))]
    )
  assert digests[0] == digests[1]


def test_skipped_step_adds_no_loss():
  config = tiny_dit_config(**{EVERY: 1000})
  experiment = build(config)
  program = make_program(experiment)
  batch = make_batch(config)
  batch["image"][3, 0, 0] = np.nan
  with sharding.use_mesh(experiment.mesh):
    state = program.init(jax.random.key(3))
    placed = sharding.put_batch(batch, experiment.mesh, 8)
    _, metrics = program.step(state, placed, None)
  np.testing.assert_array_equal(metrics[LOSS_BY_TIME], np.zeros((2, NUM_TIME_BINS)))


def test_losses_by_time_are_no_scalar_metric():
  first = {"loss": jnp.array([2.0, 1.0]), LOSS_BY_TIME: jnp.ones((2, 3))}
  added = add_metrics(first, first)
  assert mean_metrics(added) == {"loss": 2.0}
  np.testing.assert_array_equal(added[LOSS_BY_TIME], np.full((2, 3), 2))


class Recorded(Events):
  """Keeps the charts that are written."""

  def __init__(self):
    super().__init__()
    self.bars, self.images = {}, {}

  def write_bars(self, step, bars):
    self.bars[step] = bars[LOSS_BY_TIME].heights.tolist()

  def write_images(self, step, images):
    self.images[step] = images[f"{LOSS_BY_TIME}_chart"]


def test_chart_covers_the_steps_since_the_one_before():
  events = Recorded()
  charts = LossByTime(events, start=0, every=4, num_steps=9)
  for done in range(1, 10):
    charts.add(done, {LOSS_BY_TIME: np.array([[done, 0.0], [1.0, 0.0]])})
  assert events.bars.keys() == events.images.keys() == {4, 8, 9}
  assert [bars[0] for bars in events.bars.values()] == [2.5, 6.5, 9.0]
  assert all(np.isnan(bars[1]) for bars in events.bars.values())


def test_chart_waits_for_the_next_log_line():
  events = Recorded()
  charts = LossByTime(events, start=0, every=4, num_steps=100)
  for done in (3, 6, 9):  # every third step has a log line
    charts.add(done, {LOSS_BY_TIME: np.array([[done], [1.0]])})
  assert events.bars == {6: [4.5], 9: [9.0]}


def test_rolled_back_steps_do_not_count():
  events = Recorded()
  charts = LossByTime(events, start=0, every=4, num_steps=100)
  charts.add(2, {LOSS_BY_TIME: np.array([[50.0], [1.0]])})
  charts.go_back(1)
  charts.add(4, {LOSS_BY_TIME: np.array([[3.0], [1.0]])})
  assert events.bars == {4: [3.0]}


def test_bars_of_the_picture_are_as_high_as_the_means():
  chart = np.asarray(draw_chart(np.array([1.0, np.nan, 0.5, 0.25]), "title"))
  is_bar = (chart == (70, 110, 180)).all(axis=-1)
  columns = np.array_split(is_bar[:, 42:472], 4, axis=1)
  first, none, half, quarter = (part.any(axis=1).sum() for part in columns)
  assert none == 0
  assert half / first == pytest.approx(0.5, abs=0.01)
  assert quarter / first == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("means", [[np.nan] * 3, [0.0] * 3, [-1.0, 2.0, np.nan]])
def test_chart_without_samples_or_below_zero_is_drawn(means):
  assert draw_chart(np.array(means), "title").size == (480, 240)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  """(workdir, the metric of each step) of a run with a chart after 2 and 4 steps."""
  workdir = tmp_path_factory.mktemp("run")
  found = []

  class Recording(loop.Trainer):
    def _step(self, state, batch, n, offset):
      reported = self._progress.add
      self._progress.add = lambda done, metrics: (
        found.append(np.asarray(metrics[LOSS_BY_TIME])),
        reported(done, metrics),
      )
      try:
        return super()._step(state, batch, n, offset)
      finally:
        self._progress.add = reported

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "Trainer", Recording)
    settings = {"sample_every": 4, "num_strips": 2, "eval.every": 4}
    scores = {"eval.metrics": "frechet", "eval.num_images": 8, "eval.batch_size": 8}
    loop.train(tiny_dit_config(**{EVERY: 2}, **settings, **scores), workdir)
  return workdir, found


def means_of(metrics):
  sums, weights = np.sum(metrics, axis=0, dtype=np.float64)
  with np.errstate(invalid="ignore"):
    return sums / weights


def events_of(workdir):
  """The events of a run, as TensorBoard reads them."""
  events = plugin_event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
  events.Reload()
  return events


def test_event_files_hold_histograms_of_the_means(whole_run):
  workdir, found = whole_run
  events = events_of(workdir)
  assert set(events.PluginTagToContent("histograms")) == {LOSS_BY_TIME}
  written = {
    event.step: make_ndarray(event.tensor_proto)
    for event in events.Tensors("loss_by_time")
  }
  assert written.keys() == {2, 4}
  for step, rows in written.items():
    assert rows.shape == (30, 3)  # TensorBoard shows 30 bars, two for each bin
    np.testing.assert_allclose(rows[:, 0], np.arange(30) / 30, atol=1e-12)
    np.testing.assert_allclose(rows[:, 1], np.arange(1, 31) / 30, atol=1e-12)
    means = np.nan_to_num(means_of(found[step - 2 : step]))
    np.testing.assert_allclose(rows[::2, 2], means, rtol=1e-6)
    np.testing.assert_allclose(rows[1::2, 2], means, rtol=1e-6)


def test_metric_lines_hold_the_means(whole_run):
  workdir, found = whole_run
  lines = [x for x in read_lines(workdir / "metrics.jsonl") if LOSS_BY_TIME in x]
  assert [line["step"] for line in lines] == [2, 4]
  for line in lines:
    means = means_of(found[line["step"] - 2 : line["step"]])
    values = [np.nan if x is None else x for x in line[LOSS_BY_TIME]]
    np.testing.assert_allclose(values, means, rtol=1e-5)


def test_event_files_hold_one_chart_one_grid_and_strips(whole_run):
  workdir, _ = whole_run
  events = events_of(workdir)
  tags = {"samples", "strips", "loss_by_time_chart"}
  assert set(events.PluginTagToContent("images")) == tags
  steps = {tag: [event.step for event in events.Tensors(tag)] for tag in tags}
  assert steps == {"samples": [4], "strips": [4], "loss_by_time_chart": [2, 4]}
  for tag in ("samples", "strips"):
    (event,) = events.Tensors(tag)
    _, _, *pngs = make_ndarray(event.tensor_proto)
    (png,) = pngs
    with Image.open(workdir / tag / "step_0000004.png") as saved:
      assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(saved))
