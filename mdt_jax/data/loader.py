"""The data loader: endless batches that depend only on a seed and a step number."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import grain
import numpy as np
from absl import flags

from mdt_jax.data import transforms
from mdt_jax.data.examples import Source
from mdt_jax.errors import SettingError


def create_loader(
  source: Source,
  *,
  seed: int,
  batch_size: int,
  flip: bool,
  start_step: int = 0,
  rows: Sequence[int] | None = None,
  num_workers: int = 0,
  num_threads: int = 8,
  prefetch: int = 8,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this process's rows of the global batches start_step, start_step + 1, …

  The examples form an endless stream with a new random order in each epoch. A batch may
  cross the end of an epoch. Row j of the global batch of step s is element
  s * batch_size + j of the stream, after the random flip. So a batch depends only on
  `seed` and s, not on `start_step` or the number of processes, workers or threads.

  Args:
    source: labelled examples. uint8 images are scaled to [-1, 1]. Float images are
      neither scaled nor flipped. A `LatentSource` yields moments.
    seed: seed of the order and of the flips, at least 0.
    batch_size: number of examples in the global batch, over all processes.
    flip: whether to mirror images left to right at random; each epoch draws anew.
    start_step: step of the first batch. Earlier batches are not read.
    rows: the R rows of the global batch that this process reads, see
      `sharding.local_rows`; None for all rows.
    num_workers: number of reading processes; 0 reads in this process.
    num_threads: number of batches read in parallel; 0 reads in the caller's thread.
    prefetch: number of batches held in memory, at least num_threads.

  Yields:
    A dict with "label" int32 (R,), and either "image" float32 (R, H, W, C), or
    "moments" (R, 2, H, W, C) in the dtype of the latent set.

  Raises:
    SettingError: `batch_size` or `seed` is out of range. The iterator raises errors of
      the source, and SettingError for a class label outside [0, source.num_classes).
  """
  if batch_size < 1:
    raise SettingError("config.batch_size", batch_size, "must be at least 1")
  if seed < 0:
    raise SettingError("config.seed", seed, "must be at least 0")
  stream = _shuffled(grain.MapDataset.source(source), seed)
  if flip:
    # The map comes after `repeat`, so that each epoch draws other flips.
    stream = stream.random_map(transforms.random_flip)
  else:
    stream = stream.map(transforms.without_draws)
  if rows is not None:
    stream = _Rows(stream, batch_size, rows)
  # The stream is endless, so all batches are full. Without drop_remainder, Grain rounds
  # the length up, beyond the largest integer if the batch size is 1.
  size = batch_size if rows is None else len(rows)
  batches = stream.batch(size, drop_remainder=True)
  batches = batches.map(transforms.pixels_to_float)
  check_labels = functools.partial(
    transforms.check_labels, num_classes=source.num_classes
  )
  batches = batches.map(check_labels)[start_step:]
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
  batches = batches.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():  # as in a notebook; Grain's workers need absl flags
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers), _handle_signals
    )
  return iter(batches)


def batch_indices(
  num_examples: int, seed: int, batch_size: int, step: int
) -> list[int]:
  """Returns the source indices of the global batch of a step, without reading it.

  Args:
    num_examples: length of the source.
    seed, batch_size: as in `create_loader`.
    step: step of the batch.
  """
  stream = _shuffled(grain.MapDataset.range(num_examples), seed)
  places = range(step * batch_size, (step + 1) * batch_size)
  return [int(cast(int, stream[place])) for place in places]


def _handle_signals(worker: int, num_workers: int) -> None:
  """Makes a worker process ignore the signals of its parent, and end with it.

  A terminal and srun send signals to all processes. The training process still needs
  batches until it has saved, so the workers must continue. Grain stops workers by an
  event, then by SIGKILL.
  """
  del worker, num_workers
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  """Waits for the parent process to end, then ends this process."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
  os._exit(1)  # a normal exit would wait for space in Grain's queue


def _shuffled(examples: grain.MapDataset, seed: int) -> grain.MapDataset:
  """Shuffles examples, in a new order each epoch, and repeats them endlessly."""
  # `MapDataset.seed` derives a seed for each later transformation. With
  # `shuffle(seed)`, epoch n of seed 1 would equal epoch n + 1 of seed 0.
  return examples.seed(seed).shuffle().repeat()


class _Rows(grain.MapDataset):
  """Keeps the elements `rows` of each group of `batch_size` consecutive elements."""

  def __init__(self, stream: grain.MapDataset, batch_size: int, rows: Sequence[int]):
    super().__init__(stream)
    self._batch_size = batch_size
    self._rows = [int(row) for row in rows]

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size * len(self._rows)

  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    step, place = divmod(index, len(self._rows))
    return self._parent[step * self._batch_size + self._rows[place]]
