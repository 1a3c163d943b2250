"""Meshes, and the sharding of the training state."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mdt_jax import sharding
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.models import create_model, partitioning
from mdt_jax.training.program import make_program
from tests import forked
from tests.training.tiny import tiny_config


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    ((-1, 1, 1), (8, 1, 1)),
    ((-1, 2, 2), (2, 2, 2)),
    ((1, -1, 2), (1, 4, 2)),
    ((2, 4, 1), (2, 4, 1)),
  ],
)
def test_axis_of_minus_one_gets_the_remaining_devices(sizes, shape):
  assert sharding.mesh_shape(sizes, 8) == shape


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((2, 2, 1), r"^config.mesh = 'data 2 x fsdp 2 x tensor 1': the product .* 8$"),
    ((-1, 3, 1), r"^config.mesh = 'data -1 x fsdp 3 x tensor 1': the product .* 8$"),
    ((-1, 16, 1), r"^config.mesh = .*: the product must be the number of devices, 8$"),
    ((-1, -1, 1), r"^config.mesh = \(-1, -1, 1\): at most one axis may be -1$"),
    ((0, 1, 1), r"^config.mesh.data = 0: must be -1 or at least 1$"),
    ((1, 1, -2), r"^config.mesh.tensor = -2: must be -1 or at least 1$"),
  ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
  with pytest.raises(SettingError, match=message):
    sharding.mesh_shape(sizes, 8)


@pytest.mark.parametrize(
  ("sizes", "attributes", "setting"),
  [
    ((1, 8, 1), {"mixer_hidden_size": 20, "mixer_num_heads": 1}, "config.mesh.fsdp"),
    ((1, 1, 8), {"mixer_num_heads": 4}, "config.mesh.tensor"),
  ],
)
def test_mesh_that_does_not_divide_the_mixer_is_refused(sizes, attributes, setting):
  tiny = dict(input_size=8, hidden_size=32, num_heads=8)
  model = create_model("MicroDiT-S/2", **tiny, **attributes)
  with pytest.raises(SettingError) as error:
    sharding.check_mesh(
      sizes, jax.devices()[:1] * 8, 1, model, batch_size=8, accumulation_steps=1
    )
  assert error.value.setting == setting


@pytest.mark.parametrize("name", ["MDTv2-S/2", "MDT-S/2"])
def test_moments_and_averages_are_sharded_like_parameters(name):
  config = tiny_config(**{"model.name": name})
  state = make_program(build(config, jax.devices()[:1])).state
  end = "decode_blocks/attention/qkv/kernel"
  spec = PartitionSpec(None, "fsdp", None, "tensor", None)
  paths = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if leaf.sharding.spec == spec
  ]
  of_decoder = [path for path in paths if path.endswith(end)]
  # The parameter, its average, and the four moments of Adan.
  assert len(of_decoder) == 6


@dataclasses.dataclass
class Device:
  process_index: int
  slice_index: int | None = None


ONE_SLICE = [Device(i // 4) for i in range(8)]
TWO_SLICES = [Device(i // 2, i // 4) for i in range(8)]


@pytest.mark.parametrize(
  ("slices", "data", "devices", "found"),
  [
    (-1, 1, ONE_SLICE, 1),
    (-1, 4, TWO_SLICES, 2),
    (2, 4, TWO_SLICES, 2),
    (1, 1, TWO_SLICES, 1),
    (2, 2, ONE_SLICE, 2),  # its processes
  ],
)
def test_slices_are_counted(slices, data, devices, found):
  assert sharding.count_slices(slices, data, devices) == found


@pytest.mark.parametrize(
  ("slices", "data", "devices", "message"),
  [
    (0, 2, ONE_SLICE, r"= 0: must be -1 or at least 1$"),
    (4, 4, TWO_SLICES, r"= 4: does not fit .* in 2 slices and 4 processes$"),
    (3, 6, ONE_SLICE, r"= 3: does not fit .* in 1 slices and 2 processes$"),
    (-1, 1, TWO_SLICES, r"= -1: the 2 slices must divide config.mesh.data = 1;"),
    (2, 3, TWO_SLICES, r"= 2: the 2 slices must divide config.mesh.data = 3;"),
  ],
)
def test_slices_that_do_not_fit_are_refused(slices, data, devices, message):
  with pytest.raises(SettingError, match="^config.mesh.slices " + message):
    sharding.count_slices(slices, data, devices)


def gradient_and_squares(w, x):
  """The gradient of a mean over a batch, and a value for each example."""

  def loss(w):
    whole = partitioning.gather_kernel(w, ("width", None))
    return ((partitioning.shard_batch(x) @ whole) ** 2).mean()

  return jax.grad(loss)(w), (x**2).sum(1)


def average_over_data():
  mesh = sharding.make_mesh(data=2, fsdp=2)
  rng = np.random.default_rng(0)
  w = rng.standard_normal((16, 64)).astype(np.float32)
  x = rng.standard_normal((8, 16)).astype(np.float32)
  parts = NamedSharding(mesh, PartitionSpec("fsdp"))
  arguments = jax.device_put(w, parts), jax.device_put(x, sharding.over_batch(mesh))
  averaged = sharding.mean_over_data(gradient_and_squares, mesh)
  with sharding.use_mesh(mesh):
    jitted = jax.jit(averaged, out_shardings=(parts, None))
    compiled = jitted.lower(*arguments).compile()
    found = compiled(*arguments)
  expected = gradient_and_squares(w, x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected
  )
  # Sums over data, by devices 0 and 2, are of a part of the gradient (16, 64).
  lines = compiled.as_text().splitlines()
  sums = [line for line in lines if "all-reduce(" in line and "{0,2}" in line]
  assert len(sums) == 1 and " f32[8,64]" in sums[0], "\n".join(sums)
  for data, fsdp in ((4, 1), (1, 4)):
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    assert sharding.mean_over_data(len, mesh) is len


def test_only_parts_of_gradients_are_summed_over_data():
  process = forked.Forked(average_over_data, num_devices=4)
  assert process.end() == 0, process.err


def test_single_process_reads_all_rows():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  np.testing.assert_array_equal(sharding.local_rows(mesh, 6), np.arange(6))


@pytest.fixture(scope="module")
def plan_of_mdtv2_b(tmp_path_factory):
  """The plan of MDTv2-B/2 with its state sharded over eight devices."""
  path = tmp_path_factory.mktemp("plan") / "plan.json"
  settings = ("mesh.data=1", "mesh.fsdp=8", "batch_size=16", "masking.num_lengths=1")
  process = forked.command(
    "mdt_jax.plan",
    "--config=configs/mdtv2_b2.py",
    "--topology=cpu:8",
    f"--json={path}",
    *(f"--config.{setting}" for setting in settings),
  )
  assert process.end() == 0, process.err
  return json.loads(path.read_text())


def test_each_of_eight_devices_holds_an_eighth_of_the_state(plan_of_mdtv2_b):
  parameters = 152_112_272
  memory = plan_of_mdtv2_b["memory"]
  # One copy of the parameters, one average, and four moments of Adan.
  for part, copies in (("parameters", 1), ("ema", 1), ("optimizer", 4)):
    assert memory[part] == pytest.approx(copies * 4 * parameters / 8, rel=0.1)
  # The other inputs and outputs of the step: the batch and metrics.
  assert memory["other"] < 2**20


def test_step_communicates_weights_but_not_activations(plan_of_mdtv2_b):
  found = plan_of_mdtv2_b["collectives"]
  assert "all-to-all" not in found
  assert "collective-permute" not in found
  # At most two gathers of the float32 weights: one for each forward pass.
  assert found["all-gather"]["sent"] < 2 * 4 * 152_112_272


@pytest.mark.parametrize("name", ["adafactor", "novograd"])
def test_optimizer_state_of_other_shapes_is_replicated(name):
  state = make_program(build(tiny_config(**{"optimizer.name": name}))).state
  shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
  others = [x for x in jax.tree.leaves(state.opt_state) if x.shape not in shapes]
  assert others and not any(any(x.sharding.spec) for x in others)
