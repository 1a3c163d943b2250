"""Opens the writers of a run: TensorBoard, metrics.jsonl and Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from mdt_jax.buckets import AnyPath
from mdt_jax.errors import one_line
from mdt_jax.logs import logger
from mdt_jax.settings import Settings
from mdt_jax.training.events import Background, Events, OwnWriter, Writer
from mdt_jax.training.metric_lines import FILE, MetricLines
from mdt_jax.training.wandb_runs import WandbRun

TENSORBOARD = "tensorboard"  # folder inside a workdir


def open_events(
  workdir: AnyPath, settings: Settings, start: int, writers: Sequence[Writer] = ()
) -> Events:
  """Opens the writers of a run. Only process 0 may call this function.

  Without a package tensorboard that can be imported, one line is logged, and no event
  files are written.

  Args:
    workdir: folder of the run; receives the folder tensorboard and metrics.jsonl.
    settings: settings of the run.
    start: number of steps done; the metrics of later steps in the workdir are removed,
      because the run repeats these steps.
    writers: further writers, see `Events`.
  """
  path, folder = workdir / FILE, workdir / TENSORBOARD
  own = [Background(str(path), lambda step: MetricLines(path, step), start)]
  try:
    event_files = importlib.import_module("mdt_jax.training.event_files")
  except Exception as error:  # a wrong protobuf raises other ones than ImportError
    logger.info("no TensorBoard events are written: %s", one_line(error))
  else:
    what = f"TensorBoard events in {folder}"
    scores = settings.eval.metric_names if settings.eval.every else ()

    def open_file(step: int | None) -> OwnWriter:
      return event_files.EventFile(folder, step, scores)

    own.append(Background(what, open_file, start))
  if (project := settings.log.wandb_project) is not None:
    config = settings.to_dict()
    own.append(
      Background(
        "Weights & Biases", lambda _: WandbRun(workdir, project, config), start
      )
    )
  return Events(own, writers)
