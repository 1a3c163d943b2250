"""The training loop: written files, resuming, stopping, latents."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
from concurrent import futures

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from mdt_jax.checkpoints import checksums, retries
from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.data import examples
from mdt_jax.data.folder_files import FolderFiles
from mdt_jax.errors import DataUnavailable, SettingError
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.training import loop, trainer
from mdt_jax.training.metric_lines import read_lines
from mdt_jax.training.preemption import Interrupted, stop_signals
from tests import forked, reference
from tests.data.folders import write_image
from tests.training.tiny import tiny_config, tiny_dit_config

# Two numbers of kept tokens, so that steps run different compiled functions. MDT
# compiles faster than MDTv2, and AdamW faster than Adan.
TWO_LENGTHS = {
  "masking.num_lengths": 2,
  "model.name": "MDT-S/2",
  "optimizer.name": "adamw",
}


def assert_same(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  config = tiny_config(sample_every=4, **TWO_LENGTHS)
  return workdir, loop.train(config, workdir)


def test_run_writes_checkpoints_config_pictures_and_events(whole_run):
  workdir, _ = whole_run
  assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"2", "4"}
  assert (workdir / "config.json").is_file()
  assert [p.name for p in (workdir / "samples").iterdir()] == ["step_0000004.png"]
  assert len(list((workdir / "tensorboard").iterdir())) == 1


def read_scalars(workdir):
  events = EventAccumulator(str(workdir / "tensorboard"), {"tensors": 0})
  events.Reload()
  return {
    tag: [event.step for event in events.Tensors(tag)]
    for tag in events.Tags()["tensors"]
  }


def test_tensorboard_has_every_scalar_at_every_logged_step(whole_run):
  scalars = read_scalars(whole_run[0])
  names = "loss mse vb masked_loss masked_mse masked_vb gradient_norm learning_rate"
  timed = "images_per_second tflops_per_chip data_wait_seconds save_seconds"
  for name in [*names.split(), *timed.split(), "compile_seconds"]:
    assert scalars[name] == [2, 4], name


def test_log_line_on_a_cpu_has_flops_and_no_share_of_a_peak(tmp_path, caplog):
  with caplog.at_level(logging.INFO, "mdt_jax"):
    loop.train(tiny_dit_config(), tmp_path)
  first, last = (line for line in caplog.messages if line.startswith("step "))
  for line in (first, last):
    assert " TFLOP/s a chip" in line and "MFU" not in line
    assert "waiting for data" in line and "saving" in line
  assert "compiling" in first and "compiling" not in last


def test_metric_lines_have_the_values_of_tensorboard(whole_run):
  lines = read_lines(whole_run[0] / "metrics.jsonl")
  assert [line["step"] for line in lines] == [2, 4]
  events = EventAccumulator(str(whole_run[0] / "tensorboard"), {"tensors": 0})
  events.Reload()
  written = [
    float(make_ndarray(event.tensor_proto)) for event in events.Tensors("loss")
  ]
  assert written == [np.float32(line["loss"]) for line in lines]


def test_resumed_run_repeats_no_metric_line(tmp_path):
  config = tiny_dit_config(log_every=1)
  loop.train(config, tmp_path)
  path, before = tmp_path / "metrics.jsonl", read_lines(tmp_path / "metrics.jsonl")
  # As if the run was killed in step 4, before its save, while it wrote a line.
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  path.write_bytes(path.read_bytes()[:-5])
  loop.train(config, tmp_path)
  after = read_lines(path)
  assert [line["step"] for line in after] == [1, 2, 3, 4]
  assert [line["loss"] for line in after] == [line["loss"] for line in before]


def test_resumed_run_is_bit_identical(whole_run, tmp_path, caplog):
  config = tiny_config(**TWO_LENGTHS)
  config.num_steps = 2
  loop.train(config, tmp_path)
  config.num_steps = 4
  with caplog.at_level(logging.INFO, "mdt_jax"):
    resumed = loop.train(config, tmp_path)
  assert_same(whole_run[1], resumed)
  assert any("config.num_steps was 2, now 4" in line for line in caplog.messages)
  compiled = [line for line in caplog.messages if line.startswith("compiling ")]
  assert [line.split("program ")[1] for line in compiled] == [
    f"{i + 1} of at most 2 …" for i in range(len(compiled))
  ]
  assert compiled


def test_finished_run_does_not_train_again(whole_run, caplog):
  workdir, state = whole_run
  before = (workdir / "checkpoints" / "4").stat().st_mtime_ns
  again = loop.train(tiny_config(sample_every=4, **TWO_LENGTHS), workdir)
  assert (workdir / "checkpoints" / "4").stat().st_mtime_ns == before
  assert int(again.step) == int(state.step) == 4


def test_first_signal_saves_the_current_step(tmp_path, monkeypatch):
  original = trainer.Progress.add

  def stop_at_three(self, done, metrics):
    original(self, done, metrics)
    if done == 3:
      os.kill(os.getpid(), signal.SIGINT)

  monkeypatch.setattr(trainer.Progress, "add", stop_at_three)
  with pytest.raises(Interrupted, match="step 3"):
    loop.train(tiny_dit_config(), tmp_path)
  checkpoints = Checkpoints(tmp_path, 2)
  assert checkpoints.latest_step() == 3
  checkpoints.close()


def test_failed_save_is_retried_before_the_next_scheduled_save(tmp_path, monkeypatch):
  write, left = checksums.write_checksums, [OSError(28, "No space left on device")]

  def fail_once(folder):
    if left:
      raise left.pop()
    write(folder)

  original = Checkpoints.must_retry

  def look_once_it_has_ended(self):
    if self._pending is not None:
      futures.wait([self._pending])
    return original(self)

  monkeypatch.setattr(checksums, "write_checksums", fail_once)
  monkeypatch.setattr(retries, "FIRST_PAUSE", 0)
  monkeypatch.setattr(Checkpoints, "must_retry", look_once_it_has_ended)
  changes = {"num_steps": 7, "checkpoint_every": 3, "checkpoints_to_keep": 9}
  loop.train(tiny_dit_config(**changes), tmp_path)
  # The save of step 3 failed. The loop noticed after step 4 and saved step 5.
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"5", "6", "7"}


def test_second_signal_stops_immediately(request):
  # SIGINT is ignored when a shell runs the tests in the background.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
  with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
    signal.raise_signal(signal.SIGINT)
    assert stop == [signal.SIGINT]
    signal.raise_signal(signal.SIGINT)


def test_signal_handlers_of_the_caller_are_restored():
  before = signal.getsignal(signal.SIGTERM)
  with stop_signals():
    assert signal.getsignal(signal.SIGTERM) != before
  assert signal.getsignal(signal.SIGTERM) == before


def test_stop_signals_work_outside_the_main_thread(tmp_path):
  """Some notebooks run cells in threads, which cannot install signal handlers."""
  failures = []

  def run():
    try:
      with stop_signals() as stop:
        assert stop == []
    except Exception as error:
      failures.append(error)

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert not failures


def test_too_few_classes_are_refused_before_writing(tmp_path):
  config = tiny_config(**{"model.num_classes": 9})
  with pytest.raises(SettingError, match=r"config\.model\.num_classes = 9"):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["DiT-S/2", "MDTv2-S/2"])
def test_other_variants_train_on_the_same_config(tmp_path, name):
  changes = {"model.name": name, "num_steps": 1, "optimizer.name": "adamw"}
  assert int(loop.train(tiny_config(**changes), tmp_path).step) == 1


def test_too_many_unreadable_files_save_and_stop_the_run(
  tmp_path,
):
  from PIL import Image

  data = tmp_path / "data" / "a"
  data.mkdir(parents=True)
  for i in range(30):
    Image.new("L", (8, 8), i).save(data / f"{i:02d}.png")
  (data / "90.png").write_bytes(b"no image")
  config = tiny_dit_config(
    **{
      "data.source": "images",
      "data.path": str(data.parent),
      "data.max_unreadable": 0,
      "seed": 1,  # The unreadable file is in the last batch of the first epoch.
      "num_steps": 20,
    }
  )
  with pytest.raises(SettingError, match=r"config\.data\.max_unreadable = 0"):
    loop.train(config, tmp_path / "run")
  checkpoints = Checkpoints(tmp_path / "run", 2)
  assert checkpoints.latest_step() == 3
  checkpoints.close()


def test_data_disk_that_stays_away_saves_and_stops_the_run(tmp_path, monkeypatch):
  for i in range(30):
    write_image(tmp_path / "data" / f"{i:02d}.png", i, mode="L")
  read, left = FolderFiles.read, [None] * 100  # 8 images are looked at first

  def read_a_while(self, index):
    if not left:
      raise OSError(errno.ESTALE, "Stale file handle")
    left.pop()
    return read(self, index)

  monkeypatch.setattr(FolderFiles, "read", read_a_while)
  monkeypatch.setattr(examples, "PAUSES", (0.0,))
  config = tiny_dit_config(
    **{
      "data.source": "images",
      "data.path": str(tmp_path / "data"),
      "num_steps": 20,
      "checkpoint_every": 20,
    }
  )
  with pytest.raises(DataUnavailable, match="Stale file handle"):
    loop.train(config, tmp_path / "run")
  checkpoints = Checkpoints(tmp_path / "run", 2)
  assert checkpoints.latest_step() == 11
  checkpoints.close()


def test_finished_run_keeps_its_config_file(tmp_path):
  loop.train(tiny_dit_config(num_steps=2), tmp_path)
  before = (tmp_path / "config.json").read_text()
  loop.train(tiny_dit_config(num_steps=1), tmp_path)
  assert (tmp_path / "config.json").read_text() == before


def test_workdir_that_is_a_file_is_refused(tmp_path):
  (tmp_path / "run").write_text("kept")
  with pytest.raises(SettingError, match=r"--workdir = .*must be a folder"):
    loop.train(tiny_dit_config(), tmp_path / "run")


# Latents.

VAE = reference.FIXTURES / "vae"
PHOTOS = 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder with smooth images of two classes, and the set of their latents."""
  from PIL import Image

  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  for i in range(PHOTOS):
    (folder / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((40, 36), Image.Resampling.BICUBIC)
    image.save(folder / "images" / "ab"[i % 2] / f"{i}.png")
  process = forked.command(
    "mdt_jax.encode",
    f"--source={folder / 'images'}",
    f"--vae={VAE}",
    f"--output={folder / 'latents'}",
    "--image_size=32",
    "--batch_size=8",
    "--num_shards=2",
  )
  assert process.end() == 0, process.err
  return folder


def latent_config(photos, source, **changes):
  return tiny_dit_config(
    **{
      "model.input_size": 4,
      "model.in_channels": 4,
      "model.num_classes": 2,
      "data.source": source,
      "data.path": str(photos / source),
      "data.flip": True,
      "num_steps": 3,
      **changes,
    }
  )


def test_encoding_during_training_matches_stored_latents(photos, tmp_path):
  """Images, flips and posterior samples are equal. Only stored latents are rounded."""
  stored = loop.train(latent_config(photos, "latents"), tmp_path / "stored")
  changes = {"data.vae": str(VAE)}
  encoded = loop.train(latent_config(photos, "images", **changes), tmp_path / "visit")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    stored.ema,
    encoded.ema,
  )


def test_sample_pictures_of_a_latent_run_are_decoded(photos, tmp_path):
  from PIL import Image

  changes = {"data.vae": str(VAE), "sample_every": 3, "num_samples": 1}
  loop.train(latent_config(photos, "latents", **changes), tmp_path)
  with Image.open(tmp_path / "samples" / "step_0000003.png") as picture:
    assert picture.size[0] >= 64  # 32 pixels, enlarged. A latent has 4.
  images = Pipeline.from_checkpoint(tmp_path).draw([0, 1], num_steps=2)
  assert images.shape == (2, 32, 32, 3)
  undecoded = Pipeline.from_checkpoint(tmp_path, vae="none")
  assert undecoded.draw([0, 1], num_steps=2).shape == (2, 4, 4, 4)


def test_latents_of_another_size_are_refused_before_writing(photos, tmp_path):
  config = latent_config(photos, "latents", **{"model.input_size": 8})
  with pytest.raises(SettingError, match=r"\(4, 4, 4\).* config.model.input_size"):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_autoencoder_with_another_scaling_factor_is_refused(photos, tmp_path):
  shutil.copytree(VAE, tmp_path / "vae")
  path = tmp_path / "vae" / "config.json"
  path.write_text(path.read_text().replace("0.18215", "0.13025"))
  changes = {"data.vae": str(tmp_path / "vae")}
  with pytest.raises(SettingError, match=r"scaling_factor = 0\.18215") as error:
    loop.train(latent_config(photos, "latents", **changes), tmp_path / "run")
  assert "0.13025" in str(error.value)
  assert not (tmp_path / "run").exists()
