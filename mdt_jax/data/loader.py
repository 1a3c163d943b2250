"""Batches without end, of which a step number is the only state."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from mdt_jax.data import sources, transforms
from mdt_jax.errors import SettingError


def create_loader(
  source: sources.Source,
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

  The source is shuffled anew for each epoch and repeated for ever; batches run across
  the ends of epochs. Row j of the global batch of step s is element s * batch_size + j
  of that stream, flip included. A batch therefore depends on `seed` and s alone, not on
  the number of processes nor on where the iterator started.

  Args:
    source: labelled examples. uint8 images are scaled to [-1, 1]; float images are
      neither scaled nor flipped; latents of `LatentSource` come as their moments.
    seed: seed of the order and of the flips, >= 0.
    batch_size: examples in the global batch, over all processes.
    flip: whether to mirror images left to right at random, drawn anew at each visit.
    start_step: the step of the first batch; earlier ones are not read.
    rows: R rows of the global batch that this process reads, see
      `sharding.local_rows`; None for all.
    num_workers: processes that read; 0 reads in this one.
    num_threads: batches read at the same time; 0 reads in the caller's thread.
    prefetch: batches held ready in memory, >= num_threads.

  Yields:
    "image" float32 (R, H, W, C), or "moments" (R, 2, H, W, C) in the type they are
    stored in, and "label" int32 (R,).

  Raises:
    SettingError: the batch size or the seed is out of range; from the iterator, what
      the source raises.
  """
  if batch_size < 1:
    raise SettingError("config.batch_size", batch_size, "must be at least 1")
  if seed < 0:
    raise SettingError("config.seed", seed, "accepted is a whole number from 0")
  stream = _shuffled(grain.MapDataset.source(source), seed)
  if flip:
    # After `repeat`: the draw goes by the place in the stream, so each visit has one.
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
    if not flags.FLAGS.is_parsed():  # in a notebook; Grain reads its flags there
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers), _live_as_the_run
    )
  return iter(batches)


def batch_indices(
  num_examples: int, seed: int, batch_size: int, step: int
) -> list[int]:
  """Indices into a source of that length, of the global batch of a step."""
  stream = _shuffled(grain.MapDataset.range(num_examples), seed)
  return [int(stream[step * batch_size + row]) for row in range(batch_size)]


def _live_as_the_run(worker: int, num_workers: int) -> None:
  """In a worker process: it ends when its run wants it to, or is gone."""
  del worker, num_workers
  # Terminals and srun signal it with its run, which takes batches until it has saved.
  # Grain stops it by an event, and after that by SIGKILL.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
  multiprocessing.parent_process().join()  # Grain would wait for room in its queue
  os._exit(1)


def _shuffled(examples: grain.MapDataset, seed: int) -> grain.MapDataset:
  # `seed` derives a seed for each later transformation. Given to `shuffle` directly,
  # it would make seed 1 run through the epochs of seed 0, one epoch ahead.
  return examples.seed(seed).shuffle().repeat()


class _Rows(grain.MapDataset):
  """Of each `batch_size` elements in turn, those at the places `rows`."""

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
