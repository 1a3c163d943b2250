"""ShardedImages: blocks on disk, resumption, several processes, the merged .npz."""

from __future__ import annotations

import io
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mdt_jax.checkpoints.loading import save_model
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.sampling import pictures
from mdt_jax.sampling.blocks import Request
from mdt_jax.sampling.writer import ShardedImages
from tests import forked, reference
from tests.training.tiny import tiny_config

REQUEST = Request(np.arange(10) % 3, seed=0, block_size=4)  # Blocks of 4, 4 and 2.
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)


class Maker:
  """Yields the requested blocks, records them in `made`, and stops at `stop_at`."""

  def __init__(self, stop_at=None):
    self.made = []
    self.stop_at = stop_at

  def __call__(self, blocks, on_step=None):
    for block in blocks:
      if block == self.stop_at:
        raise KeyboardInterrupt
      self.made.append(block)
      yield block, PIXELS[REQUEST.ids(block)]


def sharded(folder, seed=0, **options):
  return ShardedImages(folder, REQUEST, {"seed": seed, "images": 10}, **options)


def write(folder, maker=None, **options):
  sharded(folder, **options).write(maker or Maker(), progress=False)
  return (folder / "samples.npz").read_bytes()


def test_npz_holds_all_images_as_arr_0_and_arr_1(tmp_path):
  write(tmp_path)
  with np.load(tmp_path / "samples.npz", allow_pickle=False) as data:
    np.testing.assert_array_equal(data["arr_0"], PIXELS)
    np.testing.assert_array_equal(data["arr_1"], REQUEST.labels)
  assert not list(tmp_path.glob("partial*"))
  assert not list(tmp_path.glob(".*"))


def test_resumed_run_generates_only_the_missing_blocks(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / "stopped", Maker(stop_at=2))
  maker = Maker()
  resumed = write(tmp_path / "stopped", maker)
  assert maker.made == [2]
  assert resumed == write(tmp_path / "whole")


def test_partially_written_block_is_generated_again(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / "stopped", Maker(stop_at=1))
  (tmp_path / "stopped" / "partial" / ".000001.npy.partial").write_bytes(b"half")
  assert write(tmp_path / "stopped") == write(tmp_path / "whole")


def test_interrupted_merge_is_repeated_on_resume(tmp_path, monkeypatch):
  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(pictures, "write_npz", stop)
    with pytest.raises(KeyboardInterrupt):
      write(tmp_path / "stopped")
  assert not (tmp_path / "stopped" / "samples.npz").exists()
  maker = Maker()
  assert write(tmp_path / "stopped", maker) == write(tmp_path / "whole")
  assert maker.made == []


def test_unfinished_images_with_other_settings_are_refused(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, Maker(stop_at=1))
  with pytest.raises(SettingError, match="seed was 0, now 1"):
    sharded(tmp_path, seed=1)
  maker = Maker()
  write(tmp_path, maker)
  assert maker.made == [1, 2]


def test_images_are_complete_only_for_the_same_settings(tmp_path):
  write(tmp_path)
  assert sharded(tmp_path).is_complete
  assert not sharded(tmp_path, seed=1, overwrite=True).is_complete


@pytest.mark.parametrize("has_settings", [True, False])
def test_finished_images_of_other_settings_need_overwrite(tmp_path, has_settings):
  before = write(tmp_path)
  if not has_settings:
    (tmp_path / "samples.json").unlink()
  with pytest.raises(SettingError) as error:
    sharded(tmp_path, seed=1)
  assert error.value.setting == "folder" and error.value.value == str(tmp_path)
  assert "overwrite" in error.value.accepted
  assert ("seed was 0, now 1" in error.value.accepted) == has_settings
  assert (tmp_path / "samples.npz").read_bytes() == before
  write(tmp_path, seed=1, overwrite=True)
  assert sharded(tmp_path, seed=1).is_complete


def test_stopped_overwriting_resumes_without_overwrite(tmp_path):
  write(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, Maker(stop_at=1), seed=1, overwrite=True)
  maker = Maker()
  write(tmp_path, maker, seed=1)
  assert maker.made == [1, 2]


@pytest.mark.parametrize(
  "content",
  [b"", b"\x93NUMPY", PIXELS.tobytes()],
  ids=["empty", "cut", "no array"],
)
def test_damaged_block_is_drawn_again(tmp_path, content, caplog):
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / "stopped", Maker(stop_at=2))
  (tmp_path / "stopped" / "partial" / "000000.npy").write_bytes(content)
  maker = Maker()
  resumed = write(tmp_path / "stopped", maker)
  assert maker.made == [0, 2]
  assert resumed == write(tmp_path / "whole")


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 8, 8, 3)])
def test_block_of_another_shape_is_drawn_again(tmp_path, shape):
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, Maker(stop_at=2))
  np.save(tmp_path / "partial" / "000000.npy", np.zeros(shape, np.uint8))
  maker = Maker()
  write(tmp_path, maker)
  assert maker.made == [0, 2]


def test_processes_share_blocks_and_process_0_merges(tmp_path):
  makers = [Maker(), Maker()]
  with pytest.raises(FileNotFoundError):
    write(tmp_path, makers[1], process_index=1, process_count=2)
  write(tmp_path, makers[0], process_index=0, process_count=2)
  assert [maker.made for maker in makers] == [[0, 2], [1]]
  with np.load(tmp_path / "samples.npz") as data:
    np.testing.assert_array_equal(data["arr_0"], PIXELS)


@pytest.mark.parametrize("num_processes", [2, 4])
def test_late_process_does_not_start_a_finished_job_again(tmp_path, num_processes):
  for index in range(num_processes)[1:]:
    with pytest.raises(FileNotFoundError):
      write(tmp_path, process_index=index, process_count=num_processes)
  with pytest.raises(KeyboardInterrupt):  # all blocks but those of process 0 exist
    write(tmp_path, Maker(stop_at=0), process_count=num_processes)
  first, *others = (
    sharded(tmp_path, process_index=index, process_count=num_processes)
    for index in range(num_processes)
  )
  first.write(Maker(), progress=False)
  late = Maker()
  for other in others:
    other.write(late, progress=False)
  assert late.made == []
  assert sharded(tmp_path).is_complete


def test_settings_of_versions_without_a_digest_of_the_autoencoder_are_equal(tmp_path):
  digest = {"seed": 0, "images": 10, "autoencoder": "12ab"}
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, Maker(stop_at=1))
  resumed = Maker()
  ShardedImages(tmp_path, REQUEST, digest).write(resumed, progress=False)
  assert resumed.made == [1, 2]
  assert ShardedImages(tmp_path, REQUEST, digest).is_complete
  with pytest.raises(SettingError, match="other autoencoder"):
    ShardedImages(tmp_path, REQUEST, digest | {"autoencoder": "34cd"})


def test_png_names_hold_label_and_index(tmp_path):
  write(tmp_path)
  sharded(tmp_path).write_pngs()
  names = sorted(path.name for path in (tmp_path / "png").iterdir())
  assert names == sorted(f"{i % 3}_{i:06d}.png" for i in range(10))
  with Image.open(tmp_path / "png" / "1_000004.png") as picture:
    np.testing.assert_array_equal(picture, PIXELS[4])


def test_new_settings_remove_only_generated_pngs(tmp_path):
  (tmp_path / "png").mkdir()
  mine = {"mine.png", "3_000000_edited.png", "scan_20240101.png"}
  for name in mine:
    (tmp_path / "png" / name).write_bytes(b"kept")
  write(tmp_path)
  sharded(tmp_path).write_pngs()
  sharded(tmp_path, name="latents").write(Maker(), progress=False)
  assert len(list((tmp_path / "png").iterdir())) == len(mine) + len(PIXELS)
  sharded(tmp_path, seed=9, overwrite=True).write(Maker(), progress=False)
  assert {path.name for path in (tmp_path / "png").iterdir()} == mine


def test_merge_holds_one_block_in_memory(tmp_path):
  def parts():
    for _ in range(64):
      yield np.zeros((4, 256, 256, 3), np.uint8)  # 0.8 MB.

  tracemalloc.start()
  pictures.write_npz(tmp_path / "samples.npz", parts(), np.zeros(256, int))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 4e6


@pytest.mark.parametrize("count", [3, 5])
def test_number_of_labels_must_match_the_images(tmp_path, count):
  with pytest.raises(ValueError, match=f"4 images, expected {count}"):
    pictures.write_npz(tmp_path / "x.npz", [PIXELS[:4]], np.zeros(count, int))


# In a bucket.


def names_of(folder):
  return {path.name for path in folder.iterdir()}


def test_stopped_job_resumes_in_a_bucket(bucket, tmp_path):
  folder = epath.Path(bucket)
  with pytest.raises(KeyboardInterrupt):
    write(folder, Maker(stop_at=2))
  assert names_of(folder) == {"partial"}
  maker = Maker()
  resumed = write(folder, maker)
  assert maker.made == [2]
  assert resumed == write(tmp_path)
  assert names_of(folder) == {"samples.npz", "samples.png", "samples.json"}
  grid = Image.open(io.BytesIO((folder / "samples.png").read_bytes()))
  np.testing.assert_array_equal(grid, Image.open(tmp_path / "samples.png"))
  assert sharded(folder).is_complete


@pytest.mark.parametrize("cut", [0, 5, 200])
def test_damaged_block_in_a_bucket_is_drawn_again(bucket, cut):
  folder = epath.Path(bucket)
  with pytest.raises(KeyboardInterrupt):
    write(folder, Maker(stop_at=2))
  block = folder / "partial" / "000000.npy"
  block.write_bytes(block.read_bytes()[:cut])
  maker = Maker()
  write(folder, maker)
  assert maker.made == [0, 2]


def test_processes_share_blocks_in_a_bucket(bucket):
  folder = epath.Path(bucket)
  with pytest.raises(KeyboardInterrupt):  # all blocks but those of process 0 exist
    write(folder, Maker(stop_at=0), process_count=2)
  first, second = (sharded(folder, process_index=i, process_count=2) for i in (0, 1))
  makers = [Maker(), Maker()]
  second.write(makers[1], progress=False)
  first.write(makers[0], progress=False)
  assert [maker.made for maker in makers] == [[0, 2], [1]]
  second.write(makers[1], progress=False)  # late: the blocks are deleted
  assert makers[1].made == [1]
  assert "partial" not in names_of(folder)
  with np.load(io.BytesIO((folder / "samples.npz").read_bytes())) as data:
    np.testing.assert_array_equal(data["arr_0"], PIXELS)


def test_deletion_of_blocks_in_a_bucket_can_be_stopped(bucket, monkeypatch):
  folder = epath.Path(bucket)
  unlink = type(folder).unlink

  def stop_at_the_second(path, **options):
    if path.name == "000001.npy":
      raise KeyboardInterrupt
    unlink(path, **options)

  with monkeypatch.context() as patched:
    patched.setattr(type(folder), "unlink", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
      write(folder)
  assert names_of(folder / "partial") == {"000001.npy", "settings.json"}
  with pytest.raises(SettingError, match="seed was 0, now 1"):
    sharded(folder, seed=1, overwrite=True)  # would take the block for its own
  again = sharded(folder)
  assert again.is_complete
  again.remove_blocks()
  assert "partial" not in names_of(folder)
  write(folder, seed=1, overwrite=True)
  assert sharded(folder, seed=1).is_complete


def test_finished_images_in_a_bucket_need_overwrite(bucket):
  folder = epath.Path(bucket)
  write(folder)
  with pytest.raises(SettingError, match="seed was 0, now 1") as error:
    sharded(folder, seed=1)
  assert (error.value.setting, error.value.value) == ("folder", bucket)


def test_pngs_are_written_to_a_bucket_and_replaced(bucket):
  folder = epath.Path(bucket)
  (folder / "png" / "mine.png").write_bytes(b"kept")
  write(folder)
  sharded(folder).write_pngs()
  expected = {f"{i % 3}_{i:06d}.png" for i in range(10)}
  assert names_of(folder / "png") == expected | {"mine.png"}
  content = (folder / "png" / "1_000004.png").read_bytes()
  with Image.open(io.BytesIO(content)) as picture:
    np.testing.assert_array_equal(picture, PIXELS[4])
  write(folder, seed=9, overwrite=True)
  assert names_of(folder / "png") == {"mine.png"}


# The sample command on one device and on eight devices.

FLAGS = ["--num_images=300", "--batch_size=1", "--labels=random"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  experiment = build(tiny_config(**{"sampling.num_steps": 5}))
  params = reference.random_params(experiment.model)
  save_model(folder, experiment.settings, params)
  return folder


def start(checkpoint, output, num_devices, **options):
  flags = [f"--checkpoint={checkpoint}", f"--output={output}", *FLAGS]
  return forked.command("mdt_jax.sample", *flags, num_devices=num_devices, **options)


def run(checkpoint, output, num_devices, **options):
  process = start(checkpoint, output, num_devices, **options)
  assert process.end() == 0, process.err
  return (output / "samples.npz").read_bytes()


@pytest.fixture(scope="module")
def on_one_device(checkpoint, tmp_path_factory):
  return run(checkpoint, tmp_path_factory.mktemp("one"), 1)


def test_eight_devices_give_the_images_of_one_device(
  checkpoint, on_one_device, tmp_path
):
  assert run(checkpoint, tmp_path, 8) == on_one_device
  with np.load(tmp_path / "samples.npz") as data:
    assert len(np.unique(data["arr_0"], axis=0)) == 300


def test_killed_run_resumes_to_the_same_images(checkpoint, on_one_device, tmp_path):
  process = start(checkpoint, tmp_path, 1)
  while len(list((tmp_path / "partial").glob("[0-9]*.npy"))) < 3:
    assert process.is_alive(), process.err
    time.sleep(0.005)
  process.kill()
  assert process.end() == -signal.SIGKILL
  assert not (tmp_path / "samples.npz").exists()
  assert run(checkpoint, tmp_path, 8) == on_one_device


def test_run_that_was_killed_resumes_in_a_bucket(
  checkpoint, on_one_device, bucket, bucket_environment
):
  output = epath.Path(bucket)
  process = start(checkpoint, output, 1, environment=bucket_environment)
  while len(list((output / "partial").glob("*.npy"))) < 3:
    assert process.is_alive(), process.err
    time.sleep(0.005)
  process.kill()
  assert process.end() == -signal.SIGKILL
  assert names_of(output) == {"partial"}
  resumed = run(checkpoint, output, 8, environment=bucket_environment)
  assert resumed == on_one_device


@pytest.mark.parametrize("name", ["samples.json", "partial/settings.json"])
@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 5000, "\udcff"])
def test_damaged_settings_are_named(tmp_path, name, text):
  write(tmp_path)
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
  with pytest.raises(SettingError, match=Path(name).name) as error:
    sharded(tmp_path)
  assert error.value.setting == "folder"
