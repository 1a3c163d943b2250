"""Experiment: parts built from settings, and settings that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdt_jax import create_model
from mdt_jax.attention_choice import kernel_problem
from mdt_jax.errors import SettingError
from mdt_jax.experiment import Experiment, build
from mdt_jax.objectives import PlainObjective
from mdt_jax.own_parts import OwnParts
from mdt_jax.settings import Settings
from tests.training.tiny import tiny_config

FIXTURES = Path(__file__).parent / "fixtures"


def test_mask_ratio_zero_gives_the_plain_objective():
  objective = build(
    tiny_config(**{"masking.ratio": 0.0, "masking.width": 0.0})
  ).objective
  assert isinstance(objective, PlainObjective)


def test_own_network_without_the_variance_channels_is_refused():
  model = create_model("DiT-S/2", input_size=8, in_channels=1, learn_sigma=False)
  with pytest.raises(SettingError) as error:
    build(tiny_config(), model=model)
  assert error.value.setting == "model"
  assert "2 channels" in error.value.accepted
  assert "'learned_range'" in error.value.accepted


class Device:
  """What `Experiment` asks about a device."""

  def __init__(self, platform, device_kind, **more):
    self.platform, self.device_kind = platform, device_kind
    vars(self).update(more)


CPU = Device("cpu", "cpu")
NVIDIA = Device("gpu", "NVIDIA H100 80GB HBM3", compute_capability="9.0")
RADEON = Device("gpu", "Radeon RX 7900 XTX", compute_capability="gfx1100")
AMD = Device("gpu", "AMD Instinct MI300X")
T4 = Device("gpu", "Tesla T4", compute_capability="7.5")
TPU = Device("tpu", "TPU v5 lite")
V4 = Device("tpu", "TPU v4")

EVEN = {"masking.ratio": 0.5, "masking.width": 0.0, "model.dtype": "bfloat16"}


@pytest.mark.parametrize(
  ("kernel", "device", "problem"),
  [
    ("plain", CPU, None),
    ("cudnn", CPU, "needs NVIDIA GPUs, the devices are cpu"),
    ("cudnn", NVIDIA, None),
    ("cudnn", T4, "needs compute capability 8.0, Tesla T4 has 7.5"),
    ("cudnn", RADEON, "needs compute capability 8.0, Radeon RX 7900 XTX has gfx1100"),
    ("cudnn", AMD, "needs NVIDIA GPUs, the devices are AMD Instinct MI300X"),
    ("cudnn", TPU, "needs NVIDIA GPUs, the devices are TPU v5 lite"),
    ("pallas", TPU, None),
    ("pallas", NVIDIA, "needs TPUs, the devices are NVIDIA H100 80GB HBM3"),
    ("pallas", CPU, "needs TPUs, the devices are cpu"),
  ],
)
def test_kernel_of_other_devices_has_a_problem(kernel, device, problem):
  changes = {"model.attention_kernel": kernel, "model.dtype": "bfloat16"}
  even = {"masking.ratio": 0.5, "masking.width": 0.0}
  experiment = build(
    tiny_config(**{**changes, "model.attention_kernel": "plain"}, **even)
  )
  found = kernel_problem(kernel, experiment.model, experiment.objective, [device])
  assert found == problem


@pytest.mark.parametrize(
  ("kernel", "device", "changes", "needed"),
  [
    ("cudnn", NVIDIA, {"model.input_size": 10}, "an image has 25: see input_size"),
    ("cudnn", NVIDIA, {"masking.multiple": 1}, "a pass has 11: see config.masking"),
    (
      "pallas",
      TPU,
      {"model.input_size": 34},
      "a multiple of 8 up to 4096; an image has",
    ),
    ("pallas", TPU, {"model.input_size": 256}, "up to 4096; an image has 16384"),
    (
      "pallas",
      V4,
      {"model.input_size": 112},
      "2304 tokens on TPU v4; an image has",
    ),
    (
      "pallas",
      TPU,
      {
        **{"model.name": "TREAD-S/2", "model.input_size": 64, "model.depth": 8},
        **{"masking.ratio": 0.0, "objective.name": "tread"},
        "objective.arguments": {"ratio": 0.51},
      },
      "a pass has 502: see config.objective.arguments",
    ),
  ],
)
def test_numbers_of_tokens_that_a_kernel_lacks(kernel, device, changes, needed):
  fixed = {"masking.ratio": 0.3, "masking.width": 0.0, "model.dtype": "bfloat16"}
  experiment = build(tiny_config(**{**fixed, **changes}))
  found = kernel_problem(kernel, experiment.model, experiment.objective, [device])
  assert found is not None and needed in found


@pytest.mark.parametrize(
  ("device", "changes", "chosen", "logged"),
  [
    (NVIDIA, {}, "cudnn", "attention kernel: cudnn"),
    (TPU, {}, "plain", "plain (cudnn needs NVIDIA GPUs, the devices are TPU v5 lite"),
    (T4, {}, "plain", "plain (cudnn needs compute capability 8.0, Tesla T4 has 7.5"),
    (
      NVIDIA,
      {"model.dtype": "float32"},
      "plain",
      "plain (cudnn needs dtype",
    ),
    (NVIDIA, {"model.forward_mode": True}, "plain", "plain (cudnn has no forward mode"),
    (NVIDIA, {"model.input_size": 10}, "plain", "plain (cudnn needs even numbers"),
  ],
)
def test_auto_chooses_a_kernel_and_logs_it(caplog, device, changes, chosen, logged):
  config = tiny_config(**{**EVEN, **changes, "model.attention_kernel": "auto"})
  with caplog.at_level("INFO"):
    experiment = Experiment(Settings.from_config(config), devices=[device])
  assert experiment.model.attention_kernel == chosen
  assert experiment.settings.model.attention_kernel == chosen
  assert logged in caplog.text


def test_auto_leaves_an_own_network_alone():
  model = create_model("DiT-S/2", input_size=8, in_channels=1)
  config = tiny_config(**{**EVEN, "model.attention_kernel": "auto"})
  own = OwnParts(model=model)
  experiment = Experiment(Settings.from_config(config), devices=[NVIDIA], own=own)
  assert experiment.settings.model.attention_kernel == "auto"
  assert experiment.model is model
  build(config, model=model)  # on this CPU


def test_auto_runs_on_a_cpu():
  experiment = build(tiny_config(**{"model.attention_kernel": "auto"}))
  assert experiment.model.attention_kernel == "plain"


def test_fused_kernel_is_refused_before_a_run_begins():
  with pytest.raises(SettingError) as error:
    build(tiny_config(**{"model.attention_kernel": "pallas"}))
  assert error.value.setting == "config.model.attention_kernel"
  assert error.value.accepted == "needs TPUs, the devices are cpu; or use plain"


@pytest.mark.parametrize(
  "settings",
  [
    {"model.attention_kernel": "flash"},
    {"model.attention_kernel": "cudnn"},
    {
      "model.attention_kernel": "cudnn",
      "model.dtype": "bfloat16",
      "model.num_heads": 4,
    },
  ],
)
def test_bad_attention_kernel_is_named(settings):
  with pytest.raises(SettingError) as error:
    build(tiny_config(**{"model.hidden_size": 16, "model.num_heads": 2, **settings}))
  assert error.value.setting == "config.model.attention_kernel"


@pytest.mark.parametrize(
  ("source", "vae", "pixels", "encodes"),
  [
    ("digits", None, True, False),
    ("images", None, True, False),
    ("images", "folder", False, True),
    ("latents", None, False, False),
    ("latents", "folder", False, False),
    ("arrays", None, False, False),
  ],
)
def test_data_settings_decide_between_pixels_and_latents(source, vae, pixels, encodes):
  config = tiny_config(**{"data.source": source, "data.vae": vae})
  experiment = Experiment(Settings.from_config(config))
  assert experiment.holds_pixels == pixels
  assert experiment.encodes_images == encodes


def test_held_out_examples_are_not_in_the_training_set():
  experiment = build(tiny_config(**{"data.validation": 0.1}))
  training, validation = experiment.source, experiment.held_out
  assert (len(training), len(validation)) == (1617, 180)
  images = {training[i]["image"].tobytes() for i in range(len(training))}
  held_out = [validation[i]["image"].tobytes() for i in range(len(validation))]
  assert sum(image in images for image in held_out) < 5  # Some digits are equal.


@pytest.mark.parametrize("share", [-0.1, 0.6])
def test_invalid_validation_share_is_refused(share):
  with pytest.raises(SettingError, match=r"config\.data\.validation"):
    _ = build(tiny_config(**{"data.validation": share})).source


def test_held_out_without_validation_share_is_refused():
  with pytest.raises(SettingError, match=r"^config\.data\.validation = "):
    _ = build(tiny_config()).held_out


def test_autoencoder_channels_must_match_the_network():
  vae = str(FIXTURES / "vae")
  with pytest.raises(SettingError, match=r"config\.model\.in_channels = 1: must be 4"):
    _ = build(tiny_config(**{"data.vae": vae})).autoencoder


def test_sit_of_a_process_that_learns_the_variance_is_refused():
  config = tiny_config(**{"model.name": "SiT-S/2"})
  with pytest.raises(SettingError, match=r"^config\.diffusion\.variance = .*SiT-S/2"):
    build(config)
  config.diffusion.variance = "fixed_small"
  assert build(config).model.variant == "SiT"
