"""The viewer: masked pass, side-interpolater, attention, networks that lack them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError
from mdt_jax.demo import figures
from mdt_jax.demo.inside import Question, Viewer
from tests.demo.test_engine import PICTURE, make_engine

QUESTION = Question(PICTURE.tobytes(), PICTURE.shape, 3, masked=0.5, noise=0.4, seed=2)


@pytest.fixture(scope="module")
def engine():
  return make_engine()


@pytest.fixture(scope="module")
def viewer(engine):
  return Viewer(engine)


@pytest.fixture(scope="module")
def view(viewer):
  return viewer.look(QUESTION)


def test_mask_removes_the_share_of_the_tokens(view):
  assert view.removed.shape == (4, 4)
  assert view.removed.sum() == 8
  assert view.note == ""


def test_blocks_are_those_of_the_network_in_its_order(view):
  assert [block.name for block in view.attention] == [
    "in", "out", "side", "decode 1", "decode 2"
  ]  # fmt: skip


def test_attention_is_the_mean_of_softmax_weights(view):
  for block in view.attention:
    kept = np.flatnonzero(~view.removed.ravel())
    expected = kept if block.name in ("in", "out") else np.arange(16)
    assert sorted(block.ids) == expected.tolist()
    np.testing.assert_allclose(block.weights.sum(axis=-1), 1, atol=1e-5)


def test_encoder_does_not_see_a_removed_token(view):
  removed = int(np.flatnonzero(view.removed.ravel())[0])
  seen = [block.of_token(removed) is not None for block in view.attention]
  assert seen == [False, False, True, True, True]


def test_pictures_show_the_passes_of_the_network(engine, view):
  pipeline = engine.pipeline
  process, model = pipeline.experiment.process, pipeline.model
  t = jnp.array([round(0.4 * (process.end_time - 1))])
  x_t = jnp.asarray(view.noisy[None] / 127.5 - 1.0, jnp.float32)  # rounded, clipped
  output = model.apply(
    {"params": pipeline.params}, x_t, process.network_time(t), jnp.array([3])
  )
  x0 = engine.show(process.to_x0(output, x_t, t))[0]
  # The network's input was rounded to 8 bits, so the picture differs a little.
  assert np.abs(x0.astype(int) - view.unmasked).mean() < 32
  assert (view.masked != view.unmasked).any()
  assert view.side.shape == view.masked.shape == (8, 8, 1)
  assert view.tokens.shape == view.seen.shape == (4, 4, 3)


def test_kept_tokens_do_not_depend_on_the_noise_level(viewer, view):
  other = viewer.look(dataclasses.replace(QUESTION, noise=0.9))
  np.testing.assert_array_equal(other.removed, view.removed)
  assert (other.noisy != view.noisy).any()


def test_nothing_masked_has_no_side_interpolater(viewer):
  view = viewer.look(dataclasses.replace(QUESTION, masked=0.0))
  assert not view.removed.any()
  assert view.side is None
  assert view.masked is None
  assert [b.name for b in view.attention] == ["in", "out", "decode 1", "decode 2"]


def test_a_view_is_computed_once(viewer, view):
  assert viewer.look(dataclasses.replace(QUESTION)) is view


@pytest.mark.parametrize(
  ("changes", "setting"),
  [
    ({"masked": 1.0}, "masked"),
    ({"masked": -0.1}, "masked"),
    ({"noise": 1.5}, "noise"),
    ({"seed": -1}, "seed"),
  ],
)
def test_values_out_of_range_are_refused(viewer, changes, setting):
  with pytest.raises(SettingError) as caught:
    viewer.look(dataclasses.replace(QUESTION, **changes))
  assert caught.value.setting == setting


@pytest.mark.parametrize(
  ("settings", "words", "has_masked"),
  [
    ({"model.name": "DiT-S/2"}, "DiT has no masked pass", False),
    (
      {"model.name": "TREAD-S/2", "model.route_start": 1, "model.route_end": 2},
      "skip the middle blocks",
      True,
    ),
    (
      {
        "model.name": "MicroDiT-S/2",
        "model.mixer_depth": 1,
        "diffusion.variance": "fixed_large",
      },
      "nothing predicts the removed tokens",
      True,
    ),
  ],
  ids=["DiT", "TREAD", "MicroDiT"],
)
def test_other_networks_say_what_they_cannot_show(settings, words, has_masked):
  settings = {"diffusion.variance": "fixed_large", **settings}
  view = Viewer(make_engine(**settings)).look(QUESTION)
  assert words in view.note
  assert view.side is None
  assert (view.masked is not None) == has_masked
  assert view.attention


def test_noise_of_a_flow_is_finite_at_both_ends():
  viewer = Viewer(
    make_engine(
      **{
        "model.name": "SiT-S/2",
        "diffusion.process": "flow",
        "diffusion.variance": "fixed_large",
        "sampling.method": "heun",
      }
    )
  )
  clean, noise = (
    viewer.look(dataclasses.replace(QUESTION, noise=share)) for share in (0.0, 1.0)
  )
  assert np.abs(clean.noisy.astype(int) - PICTURE).max() <= 2
  assert np.abs(noise.noisy.astype(int) - PICTURE).mean() > 20


def test_heat_is_brightest_at_the_largest_weight():
  weights = np.array([0.1, 0.7, 0.2], np.float32)
  colours = figures.heat(weights, np.array([0, 3, 5]), (2, 3)).reshape(6, 3)
  assert colours.sum(axis=-1)[[0, 3, 5]].argmax() == 1
  assert (colours[1] == figures.UNSEEN).all()


@pytest.mark.parametrize("count", [1, 4, 9, 16, 5])
def test_a_click_finds_its_picture(count):
  images = np.zeros((count, 8, 8, 1), np.uint8)
  width, height = figures.grid(images).size
  columns = figures.columns_of(count)
  for number in range(count):
    x = (number % columns + 0.5) * width / columns
    y = (number // columns + 0.5) * height / -(-count // columns)
    assert figures.picture_at((x, y), (width, height), count) == number
