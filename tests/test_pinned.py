"""Training, sampling and reading reproduce the recorded numbers.

tests/fixtures/pinned holds a checkpoint, a set of latents, and results recorded with
them. make.py in that folder explains the files.

If the processor, the packages and the XLA flags equal those in machine.json, every
number must be equal bit for bit. On other machines, the tolerances are: 1e-5 of the
largest magnitude for each array of latents, one grey level for pictures, 1e-5 for each
metric of the first step, and 1e-4 for metrics of later steps. Later steps differ more
because Adan divides by small gradients: with other XLA flags, the fourth step differs
by 1.5e-5. The test of parameter digests compares bits, so other machines skip it.
Arrays read from disk must be equal everywhere.
"""

from __future__ import annotations

import functools
import json
import os
import tarfile
from unittest import mock

import numpy as np
import pytest

from mdt_jax import Pipeline
from mdt_jax.config import default_config
from tests import forked
from tests.fixtures.pinned import make

TOLERANCE = 1e-5
LATER_STEPS_TOLERANCE = 1e-4


def read_json(name):
  return json.loads((make.FOLDER / name).read_text())


def read_arrays(name):
  with np.load(make.FOLDER / name, allow_pickle=False) as data:
    return {key: data[key] for key in data.files}


@functools.cache
def recorded_flags():
  """Environment with the XLA flags of the recording."""
  return {"XLA_FLAGS": read_json("machine.json")["xla_flags"]}


@functools.cache
def is_same_machine():
  with mock.patch.dict(os.environ, recorded_flags()):
    return make.machine() == read_json("machine.json")


def assert_agrees(actual, expected, what, tolerance=TOLERANCE):
  """Compares bits on the same machine; elsewhere see the docstring of this file."""
  assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
  if is_same_machine():
    assert actual.tobytes() == expected.tobytes(), what
    return
  actual, expected = actual.astype(np.float64), expected.astype(np.float64)
  is_picture = what == "pictures"
  limit = 1 if is_picture else tolerance * np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=limit, err_msg=what)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
  """The unpacked archive: a folder with latents/ and run/."""
  folder = tmp_path_factory.mktemp("pinned")
  with tarfile.open(make.ARCHIVE) as archive:
    archive.extractall(folder, filter="data")
  return folder


def draw(run, path):
  np.savez(path, **make.draw(run))


@pytest.fixture(scope="module")
def samples(disk):
  path = disk / "samples.npz"
  process = forked.Forked(draw, disk / "run", path, environment=recorded_flags())
  assert process.end() == 0, process.err
  with np.load(path) as data:
    return {name: data[name] for name in data.files}


def resume(run, path):
  config = Pipeline.from_checkpoint(run).config
  config.data.path = str(run.with_name("latents"))
  found = make.resume(config, run)
  metrics = {
    f"{name} of {step}": value
    for step, metrics in found["metrics"].items()
    for name, value in metrics.items()
  }
  np.savez(path, **metrics, **found["digests"])


@pytest.fixture(scope="module")
def resumed(disk, samples):  # After `samples`, as resuming adds a checkpoint.
  path = disk / "resumed.npz"
  process = forked.Forked(resume, disk / "run", path, environment=recorded_flags())
  assert process.end() == 0, process.err
  with np.load(path) as data:
    return {name: data[name] for name in data.files}


@pytest.mark.parametrize("name", ["latents", "run"])
def test_archive_holds_no_path_of_a_machine(disk, name):
  for path in (disk / name).rglob("*"):
    content = path.read_bytes() if path.is_file() else b""
    assert not any(word in content for word in (b"/tmp/", b"/home/", b"/root/")), path


def test_latent_source_reads_the_recorded_latents(disk):
  actual = make.read_latents(disk / "latents")
  expected = read_arrays("latents.npz")
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    assert actual[name].dtype == array.dtype
    np.testing.assert_array_equal(actual[name], array)


def test_config_json_matches_the_config_of_the_checkpoint(disk):
  written = default_config()
  written.update(json.loads((disk / "run" / "config.json").read_text()))
  loaded = Pipeline.from_checkpoint(disk / "run").config
  loaded.sampling.ema_decay = None  # The pipeline sets it to the first decay.
  assert json.loads(written.to_json()) == json.loads(loaded.to_json())


@pytest.mark.parametrize("name", [*make.SAMPLES, "pictures"])
def test_samples_match_the_recorded_ones(samples, name):
  assert_agrees(samples[name], read_arrays("samples.npz")[name], name)


def test_resumed_training_gives_the_recorded_metrics(resumed):
  tolerance = TOLERANCE
  for step, metrics in read_json("losses.json")["metrics"].items():
    for name, recorded in metrics.items():
      expected = np.frombuffer(bytes.fromhex(recorded["hex"]), np.float32)[0]
      what = f"{name} of {step}"
      assert_agrees(resumed[what], expected, what, tolerance)
    tolerance = LATER_STEPS_TOLERANCE


@pytest.mark.parametrize("name", ["params", *(f"ema {d}" for d in make.DECAYS)])
def test_resumed_training_gives_the_recorded_parameters(resumed, name):
  if not is_same_machine():
    pytest.skip("digests compare bits, which depend on the machine")
  assert str(resumed[name]) == read_json("losses.json")["digests"][name]
