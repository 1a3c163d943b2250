"""Several processes: batches do not depend on their number, and they fail together."""

from __future__ import annotations

import functools
import json
import random
import socket
import time

import jax
import numpy as np
import pytest

from mdt_jax.checkpoints import checksums, retries
from mdt_jax.data.loader import batch_indices
from mdt_jax.exit_codes import EXIT_TRY_AGAIN
from tests.faults import runs

NUM_EXAMPLES, BATCH_SIZE, NUM_STEPS, NUM_DEVICES = 64, 8, 40, 4
STARTS = {"short": (2, 1), "whole": (2, 1, 4, 2)}  # Processes of each start.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Arrays with one class each, so that the label is the index."""
  folder = tmp_path_factory.mktemp("data")
  random = np.random.default_rng(0)
  for i in range(NUM_EXAMPLES):
    (folder / f"{i:03d}").mkdir()
    array = random.standard_normal((8, 8, 1)).astype(np.float32)
    np.save(folder / f"{i:03d}" / "0.npy", array)
  return folder


def before(records, num_processes):
  """Sets the number of devices of this process, and records its batches."""
  jax.config.update("jax_num_cpu_devices", NUM_DEVICES // num_processes)
  runs.record_batches(records)


def start(workdir, data, num_processes, folder, *more, before=before):
  """Starts the processes of one run. Each records its batches in `folder`.

  The data is that of a folder of arrays, or the digits if `data` is None.
  """
  folder.mkdir()
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  flags = [
    *(
      [f"--config.data.path={data}", "--config.data.source=arrays"]
      if data
      else ["--config.data.source=digits"]
    ),
    f"--config.model.num_classes={NUM_EXAMPLES}",
    f"--config.num_steps={NUM_STEPS}",
    "--config.mesh.fsdp=2",
    "--config.optimizer.name=adamw",  # compiles faster than Adan
  ]
  started = []
  for i in range(num_processes):
    join = [
      f"--coordinator_address=127.0.0.1:{port}",
      f"--num_processes={num_processes}",
      f"--process_id={i}",
    ]
    started.append(
      runs.Run(
        workdir,
        *flags,
        *(join if num_processes > 1 else ()),
        *more,
        before=functools.partial(before, folder / f"{i}.jsonl", num_processes),
        logs=folder,
      )
    )
  return started


def global_batches(folder):
  """Yields the labels of each batch, in the order of their rows."""
  parts = [
    [json.loads(line) for line in path.read_text().splitlines() if line.endswith("]")]
    for path in sorted(folder.glob("*.jsonl"))
  ]
  for shares in zip(*parts, strict=False):  # One process may be killed a step later.
    rows = [row for rows, _ in shares for row in rows]
    labels = [label for _, labels in shares for label in labels]
    assert sorted(rows) == list(range(BATCH_SIZE))  # One process reads each row.
    yield [label for _, label in sorted(zip(rows, labels, strict=True))]


def test_batches_do_not_depend_on_the_number_of_processes(data, tmp_path, request):
  every = request.config.getoption("--all-faults")
  counts = STARTS["whole" if every else "short"]
  workdir = tmp_path / "run"
  trained = {}
  for i, num_processes in enumerate(counts):
    folder = tmp_path / f"start_{i}"
    processes = start(workdir, data, num_processes, folder)
    if i < len(counts) - 1:
      first = 40 // len(counts) * i
      processes[0].wait_for(f"^step {first + 7}/")
      time.sleep(random.Random(i).uniform(0, 0.2))
      for process in processes:
        process.kill()
    else:
      assert [process.end() for process in processes] == [0] * num_processes
    begun = processes[0].wait_for(
      "resuming from the checkpoint at step (\\d+)|masked pass"
    )
    begin = int(begun[1] or 0)
    assert (begin > 0) == (i > 0)
    # Steps after the last checkpoint are lost when the process is killed.
    trained = {step: batch for step, batch in trained.items() if step < begin}
    trained |= dict(enumerate(global_batches(folder), begin))
  expected = {
    step: batch_indices(NUM_EXAMPLES, 0, BATCH_SIZE, step) for step in range(NUM_STEPS)
  }
  assert trained == expected


def before_a_save_fails(records, num_processes):
  """Makes the first save fail. Only process 0 writes it."""
  before(records, num_processes)
  write, left = checksums.write_checksums, [OSError(28, "No space left on device")]

  def fail_once(folder):
    if left:
      raise left.pop()
    write(folder)

  checksums.write_checksums = fail_once
  retries.FIRST_PAUSE = 0


def test_failed_save_is_reported_and_scores_written_by_all(tmp_path):
  workdir = tmp_path / "run"
  scored = [
    "--config.sample_every=20",
    "--config.num_samples=4",
    "--config.eval.every=20",
    "--config.eval.metrics=frechet",
    "--config.eval.num_images=8",
    "--config.eval.batch_size=8",
  ]
  processes = start(
    workdir, None, 2, tmp_path / "logs", *scored, before=before_a_save_fails
  )
  assert [process.end() for process in processes] == [0, 0]
  for process in processes:
    said = "THE CHECKPOINT OF STEP 5 IS NOT SAVED: [Errno 28] No space left on device"
    assert process.log.read_text().count(said) == 1
  assert runs.steps_saved(workdir)[-1] == NUM_STEPS
  assert checksums.damage(workdir / "checkpoints" / str(NUM_STEPS)) is None
  for folder, suffix in (("samples", "png"), ("scores", "json")):
    names = {path.name for path in (workdir / folder).iterdir()}
    assert names == {f"step_{step:07d}.{suffix}" for step in (20, NUM_STEPS)}


@pytest.mark.parametrize("killed", [0, 1])
def test_process_ends_with_75_when_another_is_killed(data, tmp_path, killed):
  workdir = tmp_path / "run"
  more = ["--config.num_steps=100000", "--config.grace_seconds=60"]
  processes = start(workdir, data, 2, tmp_path / "logs", *more)
  processes[0].wait_for("^step 7/")
  processes[killed].kill()
  begin = time.monotonic()
  other = processes[1 - killed]
  assert other.end() == EXIT_TRY_AGAIN, other.log.read_text()
  assert time.monotonic() - begin < 60  # config.grace_seconds
  last = other.log.read_text().splitlines()[-1]
  assert last.startswith("error: another process of the run was lost"), last
