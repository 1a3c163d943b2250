"""create_loader: batches, order, processes and workers. Its only state is the step."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from mdt_jax.data import loader
from mdt_jax.errors import SettingError

LENGTH = 24
BATCH = 8
BATCHES_AN_EPOCH = LENGTH // BATCH


class Numbered:
  """A source whose label is the index. The pixels show whether the image is flipped."""

  num_classes = LENGTH
  image_shape = (2, 3, 1)

  def __init__(self, length=LENGTH, dtype=np.uint8):
    self._length = length
    self._image = np.array([[0, 100, 200]] * 2, dtype)[..., None]
    self.reads = 0

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    self.reads += 1
    return {"image": self._image, "label": np.int32(index)}


def take(count, source=None, **settings):
  """Returns the first `count` batches."""
  settings = {"seed": 0, "batch_size": BATCH, "flip": True, **settings}
  settings = {"num_threads": 2, "prefetch": 2, **settings}
  batches = loader.create_loader(source or Numbered(), **settings)
  return list(itertools.islice(batches, count))


def order(batches):
  return np.concatenate([batch["label"] for batch in batches])


def flips(batches):
  """Returns, for each example, whether the image is flipped."""
  return np.concatenate([batch["image"][:, 0, 0, 0] > 0 for batch in batches])


def assert_batches_equal(found, expected):
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_array_equal(a["label"], b["label"])
    np.testing.assert_array_equal(a["image"], b["image"])


# Contents of a batch.


def test_batch_has_the_documented_shapes_and_types():
  (batch,) = take(1)
  found = {name: (array.shape, array.dtype) for name, array in batch.items()}
  assert found == {"image": ((8, 2, 3, 1), np.float32), "label": ((8,), np.int32)}


def test_pixels_are_scaled_to_minus_one_to_one():
  (batch,) = take(1, flip=False)
  expected = np.array([0, 100, 200], np.float32) / 127.5 - 1
  np.testing.assert_allclose(batch["image"][5, 1, :, 0], expected, atol=1e-7)


def test_float_images_are_not_rescaled_or_flipped():
  batches = take(4, Numbered(dtype=np.float32))
  images = np.concatenate([batch["image"] for batch in batches])
  assert np.all(images[..., 0] == np.array([0, 100, 200]))


# Order.


def test_every_example_occurs_once_per_epoch():
  labels = order(take(3 * BATCHES_AN_EPOCH)).reshape(3, LENGTH)
  np.testing.assert_array_equal(np.sort(labels), [np.arange(LENGTH)] * 3)


def test_epochs_are_shuffled_differently():
  epochs = order(take(5 * BATCHES_AN_EPOCH)).reshape(5, LENGTH)
  assert len(np.unique(epochs, axis=0)) == 5


def test_a_batch_may_span_two_epochs():
  labels = order(take(3, batch_size=16))
  np.testing.assert_array_equal(np.sort(labels[:LENGTH]), np.arange(LENGTH))


@pytest.mark.parametrize("start_step", [0, 3])
def test_batches_of_one_example_have_the_same_order(start_step):
  found = take(LENGTH, batch_size=1, start_step=start_step)
  assert {batch["image"].shape[0] for batch in found} == {1}
  expected = order(take(BATCHES_AN_EPOCH + 1))[start_step : start_step + LENGTH]
  np.testing.assert_array_equal(order(found), expected)


def test_batch_may_be_larger_than_the_source():
  labels = order(take(1, Numbered(3), batch_size=12)).reshape(4, 3)
  np.testing.assert_array_equal(np.sort(labels), [np.arange(3)] * 4)


def test_same_seed_gives_the_same_batches():
  assert_batches_equal(take(7), take(7))


def test_another_seed_gives_another_order():
  assert not np.array_equal(order(take(3)), order(take(3, seed=1)))


def test_epochs_of_the_next_seed_are_not_shifted_epochs():
  ahead = order(take(2 * BATCHES_AN_EPOCH))[LENGTH:]
  assert not np.array_equal(ahead, order(take(BATCHES_AN_EPOCH, seed=1)))


def test_threads_do_not_change_the_batches():
  assert_batches_equal(
    take(7, num_threads=4, prefetch=6), take(7, num_threads=0, prefetch=0)
  )


# Flips.


def test_half_of_the_visits_are_flipped():
  assert abs(np.mean(flips(take(150))) - 0.5) < 0.05


def test_flips_of_an_image_vary_between_epochs():
  batches = take(8 * BATCHES_AN_EPOCH)
  labels, flipped = order(batches), flips(batches)
  assert {len(set(flipped[labels == i])) for i in range(LENGTH)} == {2}


def test_images_are_not_flipped_when_flip_is_false():
  assert not flips(take(9, flip=False)).any()


def test_flipping_does_not_change_the_order():
  np.testing.assert_array_equal(order(take(6)), order(take(6, flip=False)))


# Steps and processes.


@pytest.mark.parametrize("start_step", [1, 2, 3, 10])
def test_start_step_continues_the_same_batches(start_step):
  whole = take(start_step + 4)
  assert_batches_equal(take(4, start_step=start_step), whole[start_step:])


@pytest.mark.parametrize("start_step", [0, 5])
@pytest.mark.parametrize(
  "parts",
  [
    np.split(np.arange(BATCH), 2),
    np.split(np.arange(BATCH), BATCH),
    [np.arange(0, BATCH, 2), np.arange(1, BATCH, 2)],  # Interleaved, as on a TPU torus.
    [np.arange(BATCH), np.arange(BATCH)],  # Both processes read all images.
  ],
)
def test_each_process_reads_its_rows_of_the_global_batches(parts, start_step):
  whole = take(5, start_step=start_step)
  for rows in parts:
    expected = [{name: x[rows] for name, x in batch.items()} for batch in whole]
    assert_batches_equal(take(5, start_step=start_step, rows=rows), expected)


def test_large_start_step_reads_no_earlier_example():
  source = Numbered()
  take(1, source, start_step=10**6, prefetch=2)
  assert source.reads <= BATCH * 3  # One batch and two prefetched ones.


def test_large_start_step_begins_a_whole_epoch():
  step = 10**6 // BATCHES_AN_EPOCH * BATCHES_AN_EPOCH  # The first step of an epoch.
  labels = order(take(BATCHES_AN_EPOCH, start_step=step))
  np.testing.assert_array_equal(np.sort(labels), np.arange(LENGTH))


# Workers.


def test_workers_ignore_sigint_and_sigterm():
  batches = loader.create_loader(
    Numbered(), seed=0, batch_size=BATCH, flip=True, num_workers=1
  )
  found = [next(batches)]  # Waits for the worker to start.
  for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
  found += itertools.islice(batches, 4)
  assert_batches_equal(found, take(5))
  batches.close()
  assert not multiprocessing.active_children()


READ = """
import time
from mdt_jax.data import loader
from tests.data.test_loader import Numbered
batches = loader.create_loader(
  Numbered(), seed=0, batch_size=8, flip=False, num_workers=1)
next(batches)
print("read", flush=True)
time.sleep(60)
"""


def test_workers_end_when_their_parent_is_killed():
  command = [sys.executable, "-c", READ]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "read\n"
    process.kill()
    process.communicate(timeout=30)  # Returns when the workers close the pipe.


# Errors.


def test_batch_size_zero_is_refused():
  with pytest.raises(
    SettingError, match=r"^config.batch_size = 0: must be at least 1$"
  ):
    take(1, batch_size=0)


def test_negative_seed_is_refused():
  with pytest.raises(SettingError, match=r"^config.seed = -1: must be at least 0$"):
    take(1, seed=-1)


@pytest.mark.parametrize("label", [-1, LENGTH])
def test_label_out_of_range_is_refused(label):
  class Mislabelled(Numbered):
    def __getitem__(self, index):
      return {**super().__getitem__(index), "label": np.int32(label)}

  with pytest.raises(SettingError, match=f"^source = 'label {label}'.*{LENGTH}"):
    take(1, Mislabelled())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_the_source_reaches_the_caller(num_workers):
  class Broken(Numbered):
    def __getitem__(self, index):
      raise SettingError("config.data.max_unreadable", 0, "too many")

  with pytest.raises(SettingError) as caught:
    take(1, Broken(), num_workers=num_workers)
  assert str(caught.value) == "config.data.max_unreadable = 0: too many"


# Imports.


def test_loading_digits_imports_neither_tensorflow_nor_torch():
  program = """
import sys
from mdt_jax.data import loader, sources
source = sources.create_source(
  "digits", path=None, image_size=8, channels=1, max_unreadable=0)
next(loader.create_loader(source, seed=0, batch_size=4, flip=False))
print(sorted({"tensorflow", "torch"} & set(sys.modules)))
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"
