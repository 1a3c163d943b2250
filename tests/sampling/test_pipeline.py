"""Pipeline: returned images, models, inpainting, invalid arguments."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import SettingError, sharding
from mdt_jax.checkpoints.loading import save_model
from mdt_jax.experiment import Experiment, build
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.sampling.generator import make_generator
from mdt_jax.sampling.pictures import to_uint8
from mdt_jax.settings import Settings
from tests import forked, reference
from tests.training.tiny import tiny_config


def save_tiny(folder, **settings):
  settings = Settings.from_config(tiny_config(**settings))
  params = reference.random_params(Experiment(settings).model)
  save_model(folder, settings, params)
  return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return save_tiny(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pipeline(checkpoint):
  return mdt_jax.Pipeline.from_checkpoint(checkpoint)


def pixels_of(pictures):
  return np.stack([np.asarray(picture) for picture in pictures])


def test_call_returns_one_picture_per_label(pipeline):
  pictures = pipeline([7, 3, 7])
  assert [(p.mode, p.size) for p in pictures] == [("L", (8, 8))] * 3
  first, _, third = pixels_of(pictures)
  assert (first != third).any()
  np.testing.assert_array_equal(pipeline.draw([7, 3, 7])[0, ..., 0], first)


def test_image_depends_on_its_seed_and_index_not_on_other_labels(pipeline):
  whole = pixels_of(pipeline([7, 3, 7, 5, 1], batch_size=2))
  np.testing.assert_array_equal(pixels_of(pipeline([7, 3, 7], batch_size=2)), whole[:3])
  assert (pixels_of(pipeline([7], batch_size=1, seed=1)) != whole[0]).any()


def test_single_label_returns_one_picture(pipeline):
  pictures = pipeline(3)
  np.testing.assert_array_equal(pixels_of(pictures), pixels_of(pipeline([3])))


def test_labels_may_be_any_sequence_or_array(pipeline):
  expected = pipeline.draw([7, 3])
  for labels in ((7, 3), np.array([7, 3], np.uint8), jnp.array([7, 3])):
    np.testing.assert_array_equal(pipeline.draw(labels), expected)


def test_null_label_draws_unconditional_images(pipeline):
  drawn = pipeline.draw([None, 10, 3], cfg_scale=1.0)
  model, sampler = pipeline.model, pipeline.job([3], cfg_scale=1.0).experiment.sampler
  labels, ids = model.conditioning.null_like(np.zeros(3, np.int32)), np.arange(3)
  unconditional = make_generator(model, sampler)(
    pipeline.params, labels, ids.astype(np.uint32), np.uint32(0)
  )
  np.testing.assert_array_equal(drawn[:2], to_uint8(np.asarray(unconditional))[:2])
  assert (drawn[2] != to_uint8(np.asarray(unconditional))[2]).any()


def test_guidance_has_no_effect_on_the_null_label(pipeline):
  guided, plain = (pipeline.draw([None], cfg_scale=w).astype(int) for w in (3.8, 1.0))
  assert np.abs(guided - plain).max() <= 1  # Rounding.


@pytest.mark.parametrize("label", [None, 10])
def test_null_label_is_refused_without_label_dropout(label):
  settings = {"model.label_dropout": 0.0, "sampling.cfg_scale": 1.0}
  experiment = build(tiny_config(**settings))
  pipeline = mdt_jax.Pipeline(experiment, reference.random_params(experiment.model), 0)
  with pytest.raises(SettingError, match="has no null label"):
    pipeline([label])


def test_pipeline_uses_the_model_of_the_experiment(pipeline):
  assert pipeline.model is pipeline.experiment.model


def test_repr_of_pipeline_and_job_is_one_line(pipeline):
  assert repr(pipeline) == "Pipeline(MDTv2-S/2, step 0, 8x8x1 pixels, 10 classes)"
  job = pipeline.job([1, 2], seed=5)
  shown = "SamplingJob(draw 2 images, ddpm in 3 steps, cfg_scale 3.8, seed 5)"
  assert repr(job) == shown


# Calls inside a mesh context of the caller.


def assert_meshes_change_nothing(mesh):
  experiment = build(tiny_config())
  pipeline = mdt_jax.Pipeline(experiment, reference.random_params(experiment.model), 0)
  draw = functools.partial(pipeline.draw, [7, 3, 5], batch_size=1)
  outside = draw()
  (generator,) = pipeline._generators.values()
  for context in (jax.set_mesh(mesh), sharding.use_mesh(experiment.mesh)):
    with context:
      before = jax.sharding.get_abstract_mesh()
      np.testing.assert_array_equal(draw(), outside)
      painted = pipeline.inpaint(IMAGE, MASK, [3])
      assert jax.sharding.get_abstract_mesh() == before
    np.testing.assert_array_equal(
      pixels_of(painted), pixels_of(pipeline.inpaint(IMAGE, MASK, [3]))
    )
  assert generator._generate._cache_size() == 1


def test_mesh_of_the_caller_does_not_change_images():
  assert_meshes_change_nothing(jax.make_mesh((1,), ("x",)))


def on_a_mesh_of_four_devices():
  assert len(jax.devices()) == 4
  assert_meshes_change_nothing(jax.make_mesh((2, 2), ("x", "y")))


def test_mesh_of_four_devices_does_not_change_images():
  process = forked.Forked(on_a_mesh_of_four_devices, num_devices=4)
  assert process.end() == 0, process.err


# Custom networks.


def own_network(**attributes):
  """A network that differs from the config of `save_tiny`."""
  tiny = Experiment(Settings.from_config(tiny_config())).model
  return tiny.clone(**{"num_heads": 4, **attributes})


@pytest.fixture(scope="module")
def own_checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("own")
  settings = Settings.from_config(tiny_config())
  save_model(folder, settings, reference.random_params(own_network()))
  return folder


def test_checkpoint_of_a_custom_network_is_sampled(own_checkpoint):
  model = own_network()
  pipeline = mdt_jax.Pipeline.from_checkpoint(own_checkpoint, model=model)
  assert pipeline.model is model
  experiment = build(tiny_config(), model=model)
  memory = mdt_jax.Pipeline(experiment, reference.random_params(model), 0)
  np.testing.assert_array_equal(pipeline.draw([7, 3]), memory.draw([7, 3]))


def test_network_without_a_count_of_flops_writes_images(tmp_path):
  class Own(mdt_jax.models.Network):
    @nn.compact
    def __call__(self, x, t, y, token_mask=None, train=False):
      c = self.conditioning.embedder(4, jnp.float32)(y, train)
      return nn.Conv(self.out_channels, (3, 3))(x + c[:, None, None, :1])

  model = Own(input_size=8, in_channels=1, num_classes=10)
  experiment = build(tiny_config(), model=model)
  pipeline = mdt_jax.Pipeline(experiment, reference.random_params(model), 0)
  assert pipeline.write(tmp_path, [7, 3]).exists()


@pytest.mark.parametrize(
  "model", [None, own_network(depth=6), own_network(variant="DiT")]
)
def test_network_that_does_not_fit_the_checkpoint_is_refused(own_checkpoint, model):
  with pytest.raises(SettingError) as error:
    mdt_jax.Pipeline.from_checkpoint(own_checkpoint, model=model)
  assert error.value.setting == "model"
  assert "\n" not in str(error.value)


def test_custom_network_without_label_dropout_refuses_guidance():
  model = own_network(label_dropout=0.0)
  experiment = build(tiny_config(**{"sampling.cfg_scale": 1.0}), model=model)
  pipeline = mdt_jax.Pipeline(experiment, reference.random_params(model), 0)
  with pytest.raises(SettingError, match=r"cfg_scale = 2\.0: must be 1"):
    pipeline([1], cfg_scale=2.0)


def test_second_call_with_the_same_settings_does_not_recompile(pipeline):
  pipeline([1], num_steps=2)
  (generator,) = [
    generator
    for (sampling, *_), generator in pipeline._generators.items()
    if "num_steps=2," in sampling
  ]
  compiled = generator._generate._cache_size()
  pipeline([2], num_steps=2, seed=5)
  assert generator._generate._cache_size() == compiled == 1


def test_write_resumes_after_an_interrupted_merge(pipeline, tmp_path, monkeypatch):
  def full(*_):
    raise OSError("no space left on device")

  with monkeypatch.context() as patched:
    patched.setattr("mdt_jax.sampling.pictures.write_npz", full)
    with pytest.raises(OSError, match="no space"):
      pipeline.write(tmp_path, [7, 3, 7], num_steps=2, progress=False)
  file = pipeline.write(tmp_path, [7, 3, 7], num_steps=2, progress=False)
  with np.load(file) as data:
    np.testing.assert_array_equal(data["arr_0"], pipeline.draw([7, 3, 7], num_steps=2))


def test_settings_of_a_call_do_not_affect_the_next_call(pipeline):
  before = pipeline.draw([1])
  pipeline.draw([1], num_steps=2, cfg_scale=1.0)
  np.testing.assert_array_equal(pipeline.draw([1]), before)


def test_vae_is_refused_for_a_pixel_model(checkpoint):
  with pytest.raises(SettingError, match="vae = 'x': must be left out"):
    mdt_jax.Pipeline.from_checkpoint(checkpoint, vae="x")
  assert mdt_jax.Pipeline.from_checkpoint(checkpoint, vae="none").autoencoder is None


def test_run_on_eight_devices_is_sampled_on_one_device(tmp_path):
  save_tiny(tmp_path, **{"mesh.data": 4, "mesh.fsdp": 2})
  assert len(mdt_jax.Pipeline.from_checkpoint(tmp_path)([1])) == 1


@pytest.mark.parametrize(
  ("arguments", "name"),
  [
    (dict(path="nowhere"), "path"),
    (dict(step=5), "step"),
    (dict(ema_decay=0.5), "ema_decay"),
  ],
)
def test_error_for_a_missing_checkpoint_names_the_argument(checkpoint, arguments, name):
  with pytest.raises(SettingError) as error:
    mdt_jax.Pipeline.from_checkpoint(**{"path": checkpoint, **arguments})
  assert error.value.setting == name


@pytest.mark.parametrize(
  ("labels", "arguments", "message"),
  [
    ([11], {}, "labels = 11: labels of this model are 0 … 9, or 10 or None"),
    (["tench"], {}, "labels = 'tench': labels of this model are numbers, 0 … 9"),
    ([], {}, "labels = []: must hold at least one label"),
    ([1], dict(seed=-1), "seed = -1: must lie in"),
    ([1], dict(batch_size=0), "batch_size = 0: must be at least 1"),
    (
      [1],
      dict(steps=5),
      "steps = 5: is no setting of sampling: arguments, cfg_channels",
    ),
    ([1], dict(num_steps=5.5), "num_steps = 5.5: must be of type int"),
    ([1], dict(num_steps=None), "num_steps = None: must be of type int"),
    ([1], dict(num_steps=2000), "num_steps = 2000: must lie in [1, "),
    ([1], dict(method="plms"), "method = 'plms': accepted are"),
    ([1], dict(spacing="even"), "spacing = 'even': accepted are"),
    ([1], dict(spacing=3), "spacing = 3: must be of type str"),
    ([1], dict(eta=float("nan")), "eta = nan: must be finite"),
    ([1], dict(ema_decay=0.9), "ema_decay = 0.9: is chosen when a checkpoint is load"),
    (
      [1],
      dict(cfg_interval=(0.5, 0.2)),
      "cfg_interval = (0.5, 0.2): must be (low, high), 0 <= low <= high",
    ),
    ([1], dict(interpolation=0.5), "interpolation = 0.5: "),
    ([1], dict(strength=0.5), "strength = 0.5: "),
  ],
)
def test_error_names_the_invalid_argument(pipeline, labels, arguments, message):
  with pytest.raises(SettingError) as error:
    pipeline(labels, **arguments)
  assert str(error.value).startswith(message)


# Inpainting and editing.

IMAGE = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
MASK = np.zeros((8, 8), bool)
MASK[:, 4:] = True


@pytest.mark.parametrize(
  "arguments", [{}, dict(interpolation=1.0, repeats=3, cfg_scale=1.0)]
)
def test_inpainting_keeps_visible_pixels_and_paints_hidden_ones(pipeline, arguments):
  painted = pixels_of(
    pipeline.inpaint(Image.fromarray(IMAGE), MASK, [3, 5], **arguments)
  )
  np.testing.assert_array_equal(painted[:, ~MASK], IMAGE[~MASK][None].repeat(2, 0))
  assert (painted[0][MASK] != painted[1][MASK]).any()


def test_inpainting_accepts_one_image_per_label(pipeline):
  given = np.stack([IMAGE, 255 - IMAGE])[..., None]
  painted = pixels_of(pipeline.inpaint(given, MASK, [3, 5]))
  np.testing.assert_array_equal(painted[:, ~MASK], given[:, ~MASK, 0])


def test_interpolation_is_zero_when_no_whole_token_is_hidden(pipeline):
  job = pipeline.job([1], inpaint=IMAGE, mask=np.eye(8, dtype=bool))
  assert job.task.interpolation == 0


def test_edit_with_low_strength_stays_near_its_image(pipeline):
  image = np.full((8, 8), 60, np.uint8)

  def distance(strength):
    edited = pixels_of(pipeline.edit(image, [3], strength=strength, num_steps=100))
    return np.abs(edited.astype(float) - image).mean()

  assert distance(0.02) < 20 < distance(1.0)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(inpaint=IMAGE), "mask = None: must be given"),
    (dict(mask=MASK), "together with inpaint"),
    (dict(inpaint=IMAGE, mask=MASK[:4]), "mask = '4x8': "),
    (dict(inpaint=IMAGE, mask=MASK | True), "mask = 'ndarray': "),
    (dict(inpaint=IMAGE[:4], mask=MASK), "inpaint = '4x8x1': must have the model's"),
    (dict(inpaint=Image.new("RGB", (8, 8)), mask=MASK), "must be grey, is RGB"),
    (dict(inpaint=IMAGE, mask=MASK, interpolation=2.0), "must lie in [0, 1]"),
    (dict(inpaint=IMAGE, mask=MASK, edit=IMAGE), "edit = "),
    (dict(inpaint=IMAGE[None, ..., None].repeat(2, 0), mask=MASK), "must be 1,"),
    (dict(inpaint=IMAGE, mask=MASK, repeats=0), "repeats = 0: must be at least 1"),
    (dict(inpaint=IMAGE, mask=MASK, repeats=2, method="heun"), "ddpm or ddim"),
    (dict(edit=IMAGE, strength=0.0), "strength = 0.0: must lie in (0, 1]"),
    (dict(edit=IMAGE, mask=MASK), "together with inpaint"),
  ],
)
def test_error_names_an_invalid_inpainting_argument(pipeline, arguments, message):
  with pytest.raises(SettingError) as error:
    pipeline.draw([1], **arguments)
  assert message in str(error.value)


def test_dit_has_no_side_interpolater():
  experiment = build(tiny_config(**{"model.name": "DiT-S/2", "masking.ratio": 0.0}))
  pipeline = mdt_jax.Pipeline(experiment, reference.random_params(experiment.model), 0)
  with pytest.raises(SettingError, match=r"interpolation = 0\.5: must be 0"):
    pipeline.job([1], inpaint=IMAGE, mask=MASK, interpolation=0.5)
  assert pipeline.job([1], inpaint=IMAGE, mask=MASK).task.interpolation == 0


# With an autoencoder. A latent covers 4 x 4 pixels; images are 32 x 32.


@pytest.fixture(scope="module")
def latent_pipeline():
  autoencoder = Autoencoder.load(str(reference.FIXTURES / "vae"))
  model = autoencoder.model
  experiment = build(
    tiny_config(
      **{"model.in_channels": model.latent_channels, "data.source": "latents"},
      **{"sampling.num_steps": 2},
    )
  )
  params = reference.random_params(experiment.model)
  return mdt_jax.Pipeline(experiment, params, 0, autoencoder)


def test_draw_decodes_latents_with_the_autoencoder(latent_pipeline):
  size = 8 * latent_pipeline.autoencoder.model.downsampling
  pixels = latent_pipeline.draw([1, 2])
  assert (pixels.shape, pixels.dtype) == ((2, size, size, 3), np.uint8)
  alone = mdt_jax.Pipeline(latent_pipeline.experiment, latent_pipeline.params, 0)
  latents = alone.draw([1, 2])
  assert latents.dtype == np.float32
  expected = to_uint8(latent_pipeline.autoencoder.decode(latents))
  difference = np.abs(pixels.astype(int) - expected)
  assert difference.max() <= 1  # Rounding of values near a whole number.


def test_inpainting_latents_keeps_the_visible_pixels(latent_pipeline):
  shape = latent_pipeline.image_shape
  image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  mask = np.zeros(shape[:2], bool)
  mask[3:20, 5:] = True
  (painted,) = latent_pipeline.inpaint(Image.fromarray(image), mask, [1])
  np.testing.assert_array_equal(np.asarray(painted)[~mask], image[~mask])
  assert (np.asarray(painted)[mask] != image[mask]).any()


def test_latent_model_without_autoencoder_returns_no_pictures(latent_pipeline):
  alone = mdt_jax.Pipeline(latent_pipeline.experiment, latent_pipeline.params, 0)
  with pytest.raises(SettingError, match="vae = None"):
    alone([1])
  with pytest.raises(SettingError, match="vae = None"):
    alone.edit(IMAGE, [1])


def test_steps_are_reported_and_change_no_bit(pipeline):
  seen = []
  for method, steps, total in (("ddim", 3, 3), ("heun", 3, 5), ("dpm++", 4, 4)):
    job = pipeline.job([1, 2], num_steps=steps, method=method, batch_size=1)
    quiet = dict(job.generate_blocks([0, 1]))
    reported = dict(job.generate_blocks([0, 1], lambda *call: seen.append(call)))
    jax.effects_barrier()
    assert sorted(seen) == sorted([(i + 1, total) for i in range(total)] * 2)
    seen.clear()
    for block, pixels in quiet.items():
      np.testing.assert_array_equal(reported[block], pixels)
