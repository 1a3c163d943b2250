"""Batches without end, of which a step number is the only state."""

from __future__ import annotations

from collections.abc import Iterator

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
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  num_threads: int = 8,
  prefetch: int = 8,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this process's rows of the global batches start_step, start_step + 1, …

  The source is shuffled anew for each epoch and repeated for ever; batches run across
  the ends of epochs. Row j of the global batch of step s is element s * batch_size + j
  of that stream, flip included, and process p holds the rows from p * local to
  (p + 1) * local - 1. A batch therefore depends on `seed` and s alone, not on the
  number of processes nor on where the iterator started.

  Args:
    source: labelled examples. uint8 images are scaled to [-1, 1]; float images are
      neither scaled nor flipped; latents of `LatentSource` come as their moments.
    seed: seed of the order and of the flips, >= 0.
    batch_size: examples in the global batch, over all processes.
    flip: whether to mirror images left to right at random, drawn anew at each visit.
    start_step: the step of the first batch; earlier ones are not read.
    process_index: this process, in [0, process_count).
    process_count: processes that share the global batch.
    num_workers: processes that read; 0 reads in this one.
    num_threads: batches read at the same time; 0 reads in the caller's thread.
    prefetch: batches held ready in memory, >= num_threads.

  Yields:
    "image" float32 (batch_size // process_count, H, W, C), or "moments"
    (batch_size // process_count, 2, H, W, C) in the type they are stored in, and
    "label" int32 (batch_size // process_count,).

  Raises:
    SettingError: where the processes cannot share the batch evenly, or the seed is
      negative; from the iterator, what the source raises.
  """
  if batch_size < 1 or batch_size % process_count:
    raise SettingError(
      "config.batch_size",
      batch_size,
      f"accepted is a positive multiple of the number of processes, {process_count}",
    )
  if seed < 0:
    raise SettingError("config.seed", seed, "accepted is a whole number from 0")
  # `seed` derives a seed for each later transformation. Given to `shuffle` directly,
  # it would make seed 1 run through the epochs of seed 0, one epoch ahead.
  stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
  if flip:
    # After `repeat`: the draw goes by the place in the stream, so each visit has one.
    stream = stream.random_map(transforms.random_flip)
  else:
    stream = stream.map(transforms.without_draws)
  # Local batches of all processes in turn; this process takes every process_count-th.
  batches = stream.batch(batch_size // process_count).map(transforms.pixels_to_float)
  batches = batches[start_step * process_count + process_index :: process_count]
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
  batches = batches.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():  # in a notebook; Grain reads its flags there
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
  return iter(batches)
