"""Settings: the recipes are those of the papers, and bad ones are named."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from mdt_jax import recipes, setting_limits
from mdt_jax.config import default_config
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.objectives import MDTUnmaskedObjective, PlainObjective
from mdt_jax.setting_groups import DiffusionSettings, split_commas
from mdt_jax.settings import Settings
from tests.training.tiny import tiny_config, tiny_dit_config

CONFIGS = Path(__file__).parents[1] / "mdt_jax" / "configs"


def load(name):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def build_on(config, num_devices):
  """Builds and checks all but the mesh, for which devices would have to be there."""
  return build(config, devices=jax.devices() * num_devices)


SIZES = ("s", "b", "l", "xl")


def test_each_published_run_and_digits_have_a_config():
  runs = {f"{v}_{s}2" for v in ("mdt", "mdtv2", "dit", "sit") for s in SIZES}
  flows = {f"mdtv2_{s}2_flow" for s in SIZES}
  others = {
    "tread_b2",
    "tread_xl2",
    "microdit_b2",
    "microdit_xl2",
    "sprint_b2",
    "sprint_xl2",
    "maskdit_b2",
    "maskdit_xl2",
    "digits",
    "dit_xl2_512",
    "mdtv2_xl2_512",
    "dit_b16_pixels",
  }
  assert {path.stem for path in CONFIGS.glob("*.py")} == runs | flows | others


@pytest.mark.parametrize("variant", ["dit", "mdtv2"])
def test_runs_at_512_pixels_have_latents_of_64(variant):
  large, small = (
    load(f"{variant}_xl2{suffix}").get_config() for suffix in ("_512", "")
  )
  assert large.model.input_size == 64
  large.model.input_size = 32
  assert large.to_dict() == small.to_dict()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_valid_and_its_docstring_gives_its_command(path):
  module = load(path.stem)
  build_on(module.get_config(), 8 if path.stem != "digits" else 1)
  assert f"python -m mdt_jax.main --config=configs/{path.name}" in module.__doc__


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_v1_runs_are_as_released(size):
  config = load(f"mdt_{size}2").get_config()
  assert config.optimizer.name == "adamw"
  assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (3e-4, 0)
  assert build_on(config, 8).objective.static_choices == (179,)
  assert config.diffusion.loss_weight == "none"
  assert (config.batch_size, tuple(config.ema_decays)) == (256, (0.9999,))
  assert build_on(config, 8).model.decode_depth == 2


@pytest.mark.parametrize(
  ("size", "rate", "decode"), [("s", 5e-4, 6), ("b", 3e-4, 6), ("xl", 3e-4, 4)]
)
def test_v2_runs_are_as_released(size, rate, decode):
  config = load(f"mdtv2_{size}2").get_config()
  assert config.optimizer.name == "adan"
  assert (config.optimizer.learning_rate, config.optimizer.clip_norm) == (rate, 1.0)
  assert config.diffusion.loss_weight == "min_snr"
  experiment = build_on(config, 8)
  assert experiment.model.decode_depth == decode
  lengths = experiment.objective.static_choices
  assert all(length % 8 == 0 for length in lengths)
  assert (lengths[0], lengths[-1]) == (128, 176)


@pytest.mark.parametrize(("size", "end"), [("b", 8), ("xl", 24)])
def test_tread_runs_are_as_released(size, end):
  config = load(f"tread_{size}2").get_config()
  experiment = build_on(config, 8)
  assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 1e-4)
  assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0, 0)
  assert (config.batch_size, tuple(config.ema_decays)) == (256, (0.9999,))
  assert experiment.objective.static_choices == (128,)
  assert experiment.model.route == range(2, end + 1)
  assert experiment.model.label_dropout == 0.1
  assert (config.diffusion.process, config.sampling.num_steps) == ("edm", 40)


@pytest.mark.parametrize(("size", "mixer"), [("b", (3, 768, 12)), ("xl", (6, 864, 12))])
def test_microdit_runs_have_the_released_training(size, mixer):
  config = load(f"microdit_{size}2").get_config()
  experiment = build_on(config, 8)
  model, process = experiment.model, experiment.process
  assert (model.mixer_depth, model.mixer_width, model.mixer_heads) == mixer
  assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 2.4e-4)
  assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.1, 0.25)
  assert (config.optimizer.warmup_steps, config.batch_size) == (2_500, 2048)
  assert (process.sigma_data, process.p_mean, process.p_std) == (0.9, -0.6, 1.2)
  steps = (0, 249_999, 250_000, config.num_steps - 1)
  kept = [experiment.objective.choose_static(0, step) for step in steps]
  assert kept == [64, 64, "unmasked", "unmasked"] and config.num_steps == 280_000
  assert (config.sampling.method, config.sampling.num_steps) == ("edm", 30)


@pytest.mark.parametrize(("size", "noise"), [(32, (-0.6, 1.2)), (64, (0.0, 0.6))])
def test_noise_of_microdit_depends_on_the_size_of_images(size, noise):
  arguments = recipes.microdit("S", size).diffusion.arguments
  assert (arguments["p_mean"], arguments["p_std"]) == noise


@pytest.mark.parametrize(("size", "middle"), [("b", 8), ("xl", 24)])
def test_sprint_runs_are_as_released(size, middle):
  config = load(f"sprint_{size}2").get_config()
  experiment = build_on(config, 8)
  assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 1e-4)
  assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0, 1)
  assert (config.batch_size, tuple(config.ema_decays)) == (256, (0.9999,))
  assert experiment.objective.static_choices == [64, "unmasked"]
  steps = config.objective.unmasked_from, config.num_steps
  assert steps == (2_000_000, 2_200_000)
  model = experiment.model
  assert (model.encoder_depth, model.middle_depth, model.decode_depth) == (2, middle, 2)
  assert model.label_dropout == 0.1
  assert config.diffusion.process == "flow"
  assert config.diffusion.arguments.to_dict() == {
    "data_time": 0,
    "time_distribution": "logit_normal",
  }
  assert (config.sampling.method, config.sampling.num_steps) == ("sde", 250)
  assert (config.sampling.cfg_scale, config.sampling.weak_ratio) == (3, 1)


@pytest.mark.parametrize("size", ["b", "xl"])
def test_maskdit_runs_are_as_released(size):
  config = load(f"maskdit_{size}2").get_config()
  experiment = build_on(config, 8)
  assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 1e-4)
  assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0, 0)
  assert (config.batch_size, tuple(config.ema_decays)) == (1024, (0.9999,))
  assert (config.num_steps, config.data.flip) == (2_000_000, False)
  assert experiment.objective.static_choices == (128,)
  assert experiment.objective.mae_weight == 0.1
  model = experiment.model
  decoder = model.decode_depth, model.decoder_hidden_size, model.decoder_num_heads
  assert (decoder, model.label_dropout) == ((8, 512, 16), 0.1)
  sampling = config.sampling
  assert (config.diffusion.process, sampling.method) == ("edm", "edm")
  assert (sampling.num_steps, sampling.cfg_scale, sampling.cfg_channels) == (40, 1.5, 0)


@pytest.mark.parametrize("size", SIZES)
def test_sit_runs_are_as_released(size):
  config = load(f"sit_{size}2").get_config()
  experiment = build_on(config, 8)
  assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 1e-4)
  assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0, 0)
  assert (config.batch_size, tuple(config.ema_decays)) == (256, (0.9999,))
  assert (config.num_steps, config.data.flip) == (400_000, True)
  assert isinstance(experiment.objective, PlainObjective)
  assert experiment.model.label_dropout == 0.1
  assert not experiment.process.learns_variance
  assert experiment.model.out_channels == 4


@pytest.mark.parametrize("size", SIZES)
def test_flow_of_mdtv2_changes_process_and_sampling_alone(size):
  config, flow = (load(f"mdtv2_{size}2{end}").get_config() for end in ("", "_flow"))
  assert flow.diffusion.process == "flow"
  lengths = [build_on(c, 8).objective.static_choices for c in (config, flow)]
  assert lengths[0] == lengths[1]
  for name in ("diffusion", "sampling"):
    flow[name] = config[name]
  assert flow.to_dict() == config.to_dict()


def test_pixels_of_dit_b16_are_256_tokens():
  model = build_on(load("dit_b16_pixels").get_config(), 8).model
  assert (model.num_tokens, model.input_shape) == (256, (256, 256, 3))
  assert (model.patch_size, model.patch_bottleneck, model.out_channels) == (16, 128, 3)


def test_dit_has_no_masked_pass():
  for config in (load("dit_s2").get_config(), tiny_config(**{"model.name": "DiT-S/2"})):
    objective = build(config).objective
    assert isinstance(objective, PlainObjective)
    assert objective.static_choices == (None,)


BAD = [
  ("model.name", "MDT-M/2", "must be NETWORK-SIZE/PATCH, such as MDTv2-S/2"),
  ("model.input_size", 9, "must be divisible by patch_size = 2"),
  ("model.hidden_size", 17, "must be divisible by num_heads = 2"),
  ("model.num_heads", 3, "must be divisible by num_heads = 3"),
  ("model.depth", 5, "must be even for MDTv2"),
  ("model.decode_depth", 9, "must lie in [1, depth = 4]"),
  ("model.dtype", "float8", "accepted are float32"),
  ("model.remat", "some", "accepted are none, full, attention"),
  ("model.unroll", 0, "must be -1 (all) or at least 1"),
  ("model.num_classes", 0, "must be at least 1"),
  ("model.label_dropout", 1.0, "must lie in [0, 1)"),
  ("masking.ratio", -0.1, "must lie in [0, 0.8]"),
  ("masking.ratio", 0.81, "must lie in [0, 0.8]"),
  ("masking.width", 0.6, "must lie in [0, 0.8 - ratio = 0.5]"),
  ("masking.num_lengths", 0, "must be at least 1"),
  ("masking.groups", 0, "must be at least 1"),
  ("eval.labels", "uniform", "accepted are random, balanced"),
  ("batch_size", 0, "must be at least 1"),
  ("profile", "a:b", "must be FIRST:LAST"),
  ("profile", "2", "must be FIRST:LAST"),
  ("profile", "", "must be FIRST:LAST"),
  ("profile", "3:1", "must be FIRST:LAST"),
  ("profile", "-1:2", "must be FIRST:LAST"),
  ("profile", "2:5", "LAST <= num_steps = 4"),
  ("profile_processes", "two", "accepted are first, all"),
  ("batch_size", 9, "must be divisible by 2"),
  ("accumulation_steps", 3, "must be divisible by 6"),
  ("num_steps", 0, "must be at least 1"),
  ("seed", -1, "must be at least 0"),
  ("log_every", 0, "must be at least 1"),
  ("checkpoints_to_keep", 1, "must be at least 2"),
  ("ema_every", 0, "must lie in [1, 4]"),
  ("ema_every", 5, "must lie in [1, 4]"),
  ("ema_decays", (1.0,), "must be one or more numbers in [0, 1)"),
  ("ema_decays", ("a",), "must be one or more numbers in [0, 1)"),
  ("seed", 2**32, "must be below 2**32"),
  ("data.num_threads", -1, "must be at least 0"),
  ("data.num_workers", -1, "must be at least 0"),
  ("model.mlp_ratio", 0.0, "must be above 0"),
  ("model.patch_bottleneck", -1, "must be at least 0"),
  ("optimizer.b1", 1.5, "must lie in [0, 1)"),
  ("ema_decays", (), "must be one or more numbers in [0, 1)"),
  ("diffusion.schedule", "sqrt", "accepted are linear, cosine"),
  ("diffusion.prediction", "x", "accepted are epsilon, x0, v"),
  ("diffusion.variance", "big", "accepted are learned_range"),
  ("diffusion.loss_weight", "snr", "accepted are none, min_snr"),
  ("diffusion.num_timesteps", 0, "must be at least 1"),
  ("timestep_sampler", "importance", "accepted are uniform, loss-second-moment"),
  ("optimizer.name", "sgdd", "accepted are adamw, adan"),
  ("optimizer.learning_rate", 0.0, "must be above 0"),
  ("optimizer.clip_norm", -1.0, "must be 0 or more"),
  ("optimizer.schedule", "step", "accepted are constant, cosine, linear"),
  ("optimizer.warmup_steps", 4, "must lie in [0, num_steps = 4)"),
  ("sampling.method", "plms", "accepted are ddpm, ddim"),
  ("sampling.spacing", "even", "accepted are uniform, log_snr, karras"),
  ("sampling.cfg_interval", ("a", "b"), "must be (low, high), 0 <= low <= high <= 1"),
  ("sampling.cfg_interval", (0.0, 1.1), "must be (low, high), 0 <= low <= high <= 1"),
  ("sampling.num_steps", 1001, "must lie in [1, config.diffusion.num_timesteps"),
  ("sampling.eta", 2.0, "must lie in [0, 1]"),
  ("sampling.cfg_scale", -1.0, "must be 0 or more"),
  ("sampling.ema_decay", 0.5, "accepted are 0.9"),
]


@pytest.mark.parametrize(("setting", "value", "accepted"), BAD)
def test_error_names_setting_value_and_accepted_values(setting, value, accepted):
  config = tiny_config(**{setting: value})
  with pytest.raises(SettingError) as error:
    build_on(config, 2)
  message = str(error.value)
  assert message.startswith("config.")
  assert accepted in message
  assert repr(value) in message or setting in (
    "model.num_heads",
    "model.depth",
    "accumulation_steps",
  )
  assert "\n" not in message


def test_groups_must_divide_the_images_of_each_device():
  changes = {"batch_size": 12, "accumulation_steps": 2, "masking.groups": 4}
  with pytest.raises(SettingError) as error:
    build_on(tiny_config(**changes), 2)
  assert str(error.value) == (
    "config.batch_size = 12: must be divisible by 16 = 2 devices (mesh axes data x "
    "fsdp) x config.accumulation_steps = 2 x config.masking.groups = 4"
  )
  assert build_on(tiny_config(**{**changes, "batch_size": 16}), 2).objective.groups == 4


def test_groups_need_a_masked_pass():
  with pytest.raises(
    SettingError, match=r"^config.masking.groups = 2: must be 1: plain"
  ):
    build(tiny_dit_config(**{"masking.groups": 2}))


def test_a_width_without_a_ratio_is_not_ignored():
  changes = {"masking.ratio": 0.0, "masking.width": 0.2}
  with pytest.raises(
    SettingError, match=r"^config.masking.width = 0.2: needs config.objective.name"
  ):
    build(tiny_config(**changes))
  build(tiny_dit_config(**changes))  # has no masked pass in any case
  masks = build(tiny_config(**changes, **{"objective.name": "mdt"})).objective
  assert masks.static_choices == (14,)
  plain = build(tiny_config(**{**changes, "masking.width": 0.0})).objective
  assert isinstance(plain, PlainObjective)


def test_checkpoints_with_an_ignored_width_can_be_resumed():
  saved = tiny_config(**{"masking.ratio": 0.0, "masking.width": 0.2}).to_dict()
  settings = Settings.from_dict(saved)
  assert settings.masking.width == 0
  assert isinstance(build(settings).objective, PlainObjective)


def test_checkpoints_with_a_mask_of_no_tokens_have_two_unmasked_passes():
  changes = {"masking.ratio": 0.0, "masking.width": 0.0, "objective.name": "mdt"}
  settings = Settings.from_dict(tiny_config(**changes).to_dict())
  assert isinstance(build(settings).objective, MDTUnmaskedObjective)


@pytest.mark.parametrize("name", setting_limits.MAXIMA)
def test_setting_above_its_largest_value_is_refused(name):
  largest = setting_limits.MAXIMA[name]
  config = default_config()
  settings = Settings.from_config(config).to_dict()
  *groups, last = name.split(".")[1:]
  group = settings
  for part in groups:
    group = group[part]
  group[last] = largest
  setting_limits.check_maxima(settings)
  group[last] = largest + 1
  with pytest.raises(SettingError) as error:
    setting_limits.check_maxima(settings)
  assert (error.value.setting, error.value.value) == (name, largest + 1)


def test_fsdp_divides_the_bottleneck():
  changes = {"mesh.data": 1, "mesh.fsdp": 2}
  build_on(tiny_config(**changes, **{"model.patch_bottleneck": 6}), 2)
  with pytest.raises(SettingError) as error:
    build_on(tiny_config(**changes, **{"model.patch_bottleneck": 5}), 2)
  assert (error.value.setting, error.value.value) == ("config.mesh.fsdp", 2)
  assert "patch_bottleneck = 5" in error.value.accepted


def test_guidance_without_label_dropout_is_refused():
  config = tiny_config(**{"model.label_dropout": 0.0})
  with pytest.raises(SettingError, match=r"config\.sampling\.cfg_scale = 3\.8"):
    build(config)


def test_unknown_setting_cannot_be_set():
  with pytest.raises(AttributeError):
    tiny_config().modle = 1


def test_settings_survive_conversion_to_a_config_and_back():
  config = tiny_config(**{"sampling.spacing": "karras"})
  settings = Settings.from_config(config)
  assert settings.to_dict() == config.to_dict()
  assert Settings.from_dict(settings.to_dict()) == settings
  assert Settings.from_config(default_config()) == Settings()


def test_settings_missing_from_a_checkpoint_get_their_defaults():
  saved = tiny_config().to_dict()
  del saved["objective"], saved["diffusion"]["process"], saved["model"]["condition"]
  settings = Settings.from_dict(saved)
  assert settings == Settings.from_config(tiny_config())


@pytest.mark.parametrize("square", [8, (8, 8), [8, 8]])
def test_square_input_is_one_number_however_it_is_given(square):
  settings = Settings.from_config(tiny_config(**{"model.input_size": square}))
  assert settings == Settings.from_config(tiny_config())
  assert settings.to_dict()["model"]["input_size"] == 8
  assert build(settings).model.input_size == 8


@pytest.mark.parametrize("size", [(4, 8), [4, 8]])
def test_input_of_height_and_width_survives_a_checkpoint(size):
  settings = Settings.from_config(tiny_config(**{"model.input_size": size}))
  saved = json.loads(json.dumps(settings.to_dict()))
  assert Settings.from_dict(saved) == settings
  assert Settings.from_dict(saved).model.input_size == (4, 8)


@pytest.mark.parametrize(
  ("size", "accepted"),
  [
    ((4, 8, 8), "must be a whole number, or (height, width)"),
    ((4,), "must be a whole number, or (height, width)"),
    ((4.0, 8), "must be a whole number, or (height, width)"),
    ((4, "8"), "must be a whole number, or (height, width)"),
    ("8", "must be of type int or tuple"),
    (8.0, "must be of type int or tuple"),
    (True, "must be of type int or tuple"),
    (None, "must be of type int or tuple"),
    ((0, 8), "must be at least 1"),
    ((8, 9), "must be divisible by patch_size = 2"),
  ],
)
def test_size_of_another_form_is_refused(size, accepted):
  with pytest.raises(SettingError) as error:
    build(tiny_config(**{"model.input_size": size}))
  assert str(error.value) == f"config.model.input_size = {size!r}: {accepted}"


def test_optional_setting_keeps_its_type():
  config = tiny_config()
  with pytest.raises(TypeError):
    config.sampling.spacing = 3


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"steps": 3}, r"^steps = 3: is no setting of sampling: arguments, cfg_channels, "),
    ({"ema_decay": 0.9}, r"^config\.sampling\.ema_decay = 0\.9: is chosen when"),
    ({"eta": "1"}, r"^config\.sampling\.eta = '1': must be of type float"),
    ({"num_steps": 0}, r"^config\.sampling\.num_steps = 0: must lie in \[1, "),
  ],
)
def test_bad_argument_of_a_call_is_named(changes, message):
  with pytest.raises(SettingError, match=message):
    Settings.from_config(tiny_config()).with_sampling(changes)


def test_sampled_decay_is_written_as_in_the_list():
  """Its text names a part of the state."""
  config = tiny_config(**{"ema_decays": (0.9999, 0), "sampling.ema_decay": 0.0})
  assert str(Settings.from_config(config).sampled_decay) == "0"


def test_settings_of_a_later_version_are_ignored_with_a_warning(caplog):
  saved = tiny_config().to_dict()
  saved["newer"], saved["data"]["colour"] = 1, "red"
  settings = Settings.from_dict(saved)
  assert settings == Settings.from_config(tiny_config())
  assert "config.data.colour, config.newer" in caplog.text


@pytest.mark.parametrize(
  ("group", "message"),
  [
    ("diffusion", "must be empty for the process gaussian"),
    ("objective", r"config\.masking"),
  ],
)
def test_open_arguments_need_an_own_process_or_objective(group, message):
  config = tiny_config()
  config[group].arguments.ratio = 0.5
  with pytest.raises(SettingError, match=rf"^config\.{group}\.arguments = .*{message}"):
    build(config)


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("", ()),
    (" a , b,", ("a", "b")),
    ("blocks/fc[1,2],x{1,2}", ("blocks/fc[1,2]", "x{1,2}")),
    ("(a,b{1}):1e-3,c", ("(a,b{1}):1e-3", "c")),
  ],
)
def test_commas_in_brackets_do_not_split(text, parts):
  assert split_commas(text) == parts


def test_settings_of_another_process_are_known():
  assert DiffusionSettings(prediction="v").without_effect == {}
  assert DiffusionSettings(process="flow").without_effect == {}
  found = DiffusionSettings(process="flow", prediction="v", schedule="cosine")
  assert found.without_effect == {"schedule": "cosine", "prediction": "v"}
