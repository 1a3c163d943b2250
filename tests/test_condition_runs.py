"""Runs of a network with a label, a vector and tokens: meshes, resume, commands."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from mdt_jax.checkpoints.loading import load_ema
from mdt_jax.data.memory import MemorySource
from mdt_jax.exit_codes import EXIT_BAD_SETTING
from mdt_jax.training import distributed
from mdt_jax.training.loop import train
from tests import forked
from tests.faults import runs
from tests.objectives import several_devices
from tests.training.tiny import tiny_config, tiny_dit_config

CONDITION = {
  "model.condition": "label+vector+tokens",
  "condition.vector": "clip",
  "condition.vector_size": 3,
  "condition.tokens": "t5",
  "condition.tokens_length": 2,
  "condition.tokens_size": 4,
}


def make_source():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
  arrays = {
    "clip": rng.standard_normal((40, 3)),
    "t5": rng.standard_normal((40, 2, 4)),
    "t5_mask": rng.random((40, 2)) < 0.7,
    "text": np.array([f"image {i}" for i in range(40)]),
  }
  return MemorySource(images, np.arange(40) % 10, 10, arrays=arrays)


def test_gradients_agree_on_several_devices(tmp_path):
  config = tiny_config(**CONDITION)
  several_devices.assert_gradients_agree(tmp_path, config, 8)


def make_config():
  scores = {
    "eval.every": 4,
    "eval.metrics": "retrieval,accuracy",
    "eval.num_images": 20,
    "eval.batch_size": 20,
  }
  return tiny_dit_config(**CONDITION, **scores, **{"sample_every": 4})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run of four steps with pictures and scores."""
  folder = tmp_path_factory.mktemp("condition") / "run"
  train(make_config(), folder, source=make_source())
  return folder


def test_resumed_run_has_the_same_bits(workdir, tmp_path):
  """It goes on from the checkpoint of step 2, with the same pictures and scores."""
  config = make_config()
  config.num_steps = 2
  train(config, tmp_path / "run", source=make_source())
  config.num_steps = 4
  train(config, tmp_path / "run", source=make_source())
  found = runs.read(tmp_path / "run", 4)
  runs.assert_same(found, runs.read(workdir, 4))
  for name in ("samples/step_0000004.png", "scores/step_0000004.json"):
    assert (tmp_path / "run" / name).read_bytes() == (workdir / name).read_bytes()


def test_run_has_pictures_and_scores(workdir):
  assert (workdir / "samples" / "step_0000004.png").exists()
  scores = (workdir / "scores" / "step_0000004.json").read_text()
  assert "eval/retrieval" in scores and "eval/accuracy" in scores


def train_on_two_devices(folder, address, num_processes, index):
  """Trains on two devices in all; both processes write and score one run."""
  if num_processes > 1:
    distributed.start(address, num_processes, index)
  train(make_config(), folder, source=make_source())


def test_two_processes_train_and_score_as_one(tmp_path):
  """Each process reads its half of the arrays; process 0 gathers what is drawn."""
  address = forked.free_address()
  devices = {1: 2, 2: 1}  # processes -> devices of each
  started = [
    forked.Forked(
      train_on_two_devices,
      tmp_path / str(count),
      address,
      count,
      index,
      num_devices=devices[count],
    )
    for count in devices
    for index in range(count)
  ]
  for process in started:
    assert process.end() == 0, process.err
  one, two = (load_ema(tmp_path / str(count)).params for count in devices)
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(compare, two, one)
  scores = [
    json.loads((tmp_path / str(count) / "scores/step_0000004.json").read_text())
    for count in devices
  ]
  names = [name for name in scores[0] if name.startswith("eval/")]
  assert {"eval/retrieval", "eval/accuracy"} <= set(names)
  assert [scores[1][name] for name in names] == [scores[0][name] for name in names]
  assert (tmp_path / "2/samples/step_0000004.png").exists()


def sample(workdir, *flags):
  command = forked.command(
    "mdt_jax.sample", f"--checkpoint={workdir}", "--num_steps=2", *flags
  )
  return command.end(), command.err


@pytest.fixture
def prompts(tmp_path):
  rng = np.random.default_rng(1)
  path = tmp_path / "prompts.npz"
  arrays = dict(clip=rng.standard_normal((3, 3)), t5=rng.standard_normal((3, 2, 4)))
  np.savez(path, label=np.array([1, 2, 3]), caption=np.array(["a", "b", "c"]), **arrays)
  return path


def test_command_draws_the_conditions_of_a_file(workdir, prompts, tmp_path):
  code, err = sample(
    workdir,
    f"--condition={prompts}",
    f"--null_condition={prompts}",
    "--cfg_scale=2",
    "--num_images=6",
    f"--output={tmp_path}/out",
  )
  assert code == 0, err
  with np.load(tmp_path / "out" / "samples.npz") as found:
    assert found["arr_0"].shape == (6, 8, 8, 1)
    assert found["arr_1"].tolist() == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
  ("flags", "error"),
  [
    ([], "--condition = None: must be given"),
    (["--condition={tmp}/missing.npz"], "--condition = '{tmp}/missing.npz'"),
    (["--condition={prompts}", "--labels=1,2,3"], "--labels = '1,2,3': must be left"),
    (
      ["--condition={tmp}/short.npz"],
      "--condition = '{tmp}/short.npz': 't5': is missing",
    ),
    (
      ["--condition={tmp}/rows.npz", "--num_images=6"],
      "--condition = '{tmp}/rows.npz': 'label': 'label' is given for 2 images, others",
    ),
    (
      ["--condition={tmp}/no_label.npz"],
      '--labels = None: must be given, or "label" among the arrays',
    ),
    (
      ["--condition={prompts}", "--null_condition={tmp}/two.npz", "--num_images=6"],
      "--null_condition = '{tmp}/two.npz': 2: must be given for one image or",
    ),
    (
      ["--condition={prompts}", "--num_images=2"],
      "--num_images = 2: must be at least 3, the number of images in --condition",
    ),
    (
      ["--condition={prompts}", "--null_condition={prompts}", "--cfg_scale=1"],
      "must be left out: no null condition is used with cfg_scale = 1",
    ),
    (["--condition={prompts}", "--null_condition={tmp}/short.npz"], "null_condition"),
  ],
)
def test_bad_files_end_in_one_line(workdir, prompts, tmp_path, flags, error):
  clip, t5 = np.zeros((3, 3)), np.zeros((3, 2, 4))
  np.savez(tmp_path / "short.npz", clip=clip)
  np.savez(tmp_path / "no_label.npz", clip=clip, t5=t5)
  np.savez(tmp_path / "rows.npz", clip=clip, t5=t5, label=np.array([1, 2]))
  np.savez(tmp_path / "two.npz", clip=clip[:2], t5=t5[:2], label=np.array([1, 2]))
  names = {"tmp": tmp_path, "prompts": prompts}
  given = [flag.format(**names) for flag in flags]
  code, err = sample(workdir, f"--output={tmp_path}/out", "--cfg_scale=2", *given)
  assert code == EXIT_BAD_SETTING
  (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
  assert error.format(**names) in line


def test_plan_counts_a_condition(tmp_path):
  config = tmp_path / "config.py"
  config.write_text(
    "from tests.training.tiny import tiny_dit_config\n"
    f"def get_config():\n  return tiny_dit_config(**{CONDITION!r})\n"
  )
  for what in ("train", "sample"):
    flags = f"--config={config}", "--topology=cpu:1", "--chip=v5e", f"--what={what}"
    command = forked.command("mdt_jax.plan", *flags)
    assert command.end() == 0, command.err
