"""Endless batches; a step number is the only state of the loader."""

from __future__ import annotations

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

  The stream of examples is the source, repeated for ever, in a new random order in each
  epoch. A batch may cross the end of an epoch. Row j of the global batch of step s is
  element s * batch_size + j of the stream, flip included. So a batch depends on `seed`
  and s alone, not on the number of processes, workers or threads, nor on `start_step`.

  Args:
    source: labelled examples. The loader scales uint8 images to [-1, 1]; it neither
      scales nor flips float images; of a `LatentSource` it yields moments.
    seed: seed of the order and of the flips, >= 0.
    batch_size: examples in the global batch, over all processes.
    flip: whether to mirror images left to right at random, with a new draw each epoch.
    start_step: the step of the first batch; the loader does not read earlier batches.
    rows: the R rows of the global batch that this process reads, see
      `sharding.local_rows`; None for all rows.
    num_workers: processes that read; 0 reads in this process.
    num_threads: batches read at the same time; 0 reads in the caller's thread.
    prefetch: batches held ready in memory, >= num_threads.

  Yields:
    "image" float32 (R, H, W, C), or "moments" (R, 2, H, W, C) in the dtype of the set;
    and "label" int32 (R,).

  Raises:
    SettingError: the batch size or the seed is out of range. The iterator raises what
      the source raises.
  """
  if batch_size < 1:
    raise SettingError("config.batch_size", batch_size, "must be at least 1")
  if seed < 0:
    raise SettingError("config.seed", seed, "accepted is a whole number from 0")
  stream = _shuffled(grain.MapDataset.source(source), seed)
  if flip:
    # After `repeat`: the draw depends on the place in the stream, so on the epoch too.
    stream = stream.random_map(transforms.random_flip)
  else:
    stream = stream.map(transforms.without_draws)
  if rows is not None:
    stream = _Rows(stream, batch_size, rows)
  batches = stream.batch(batch_size if rows is None else len(rows))
  batches = batches.map(transforms.pixels_to_float)[start_step:]
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
  batches = batches.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():  # In a notebook; Grain's workers read absl flags.
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers), _handle_signals
    )
  return iter(batches)


def batch_indices(
  num_examples: int, seed: int, batch_size: int, step: int
) -> list[int]:
  """Returns the indices, into a source of `num_examples`, of a step's global batch."""
  stream = _shuffled(grain.MapDataset.range(num_examples), seed)
  places = range(step * batch_size, (step + 1) * batch_size)
  return [int(cast(int, stream[place])) for place in places]


def _handle_signals(worker: int, num_workers: int) -> None:
  """Sets up a worker process, which ends when the training process does.

  A terminal or srun sends a signal to the workers too, while the training process still
  needs batches until it has saved. So a worker ignores signals: Grain stops it by an
  event, and then by SIGKILL.
  """
  del worker, num_workers
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
  os._exit(1)  # Grain itself would wait for a free place in its queue.


def _shuffled(examples: grain.MapDataset, seed: int) -> grain.MapDataset:
  # `MapDataset.seed` derives a seed for each later transformation. With
  # `shuffle(seed)`, seed 1 would give the epochs of seed 0, one epoch ahead.
  return examples.seed(seed).shuffle().repeat()


class _Rows(grain.MapDataset):
  """Keeps the elements `rows` of every `batch_size` consecutive elements."""

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
