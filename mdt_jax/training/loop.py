"""A training run, from its config to its last checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence

import jax
import optax
from clu import parameter_overview
from ml_collections import ConfigDict

from mdt_jax import builders, sharding
from mdt_jax.buckets import AnyPath
from mdt_jax.checkpoints.lock import locked
from mdt_jax.checkpoints.manager import Checkpoints, NothingSavedError
from mdt_jax.config import write_config
from mdt_jax.data import class_labels
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.data.examples import Source
from mdt_jax.diffusion.guidance import Guidance
from mdt_jax.evaluation.evaluator import (
  check_eval,
  load_training_inception,
  make_training_evaluator,
)
from mdt_jax.experiment import Experiment, build
from mdt_jax.logs import counted, logger
from mdt_jax.models.registry import Model
from mdt_jax.objectives import Objective
from mdt_jax.paths import absolute, output_folder
from mdt_jax.pretrained.tensors import flatten
from mdt_jax.sampling.token_guidance import check_tokens
from mdt_jax.settings import Settings
from mdt_jax.train_state import TrainState
from mdt_jax.training import distributed
from mdt_jax.training.events import Events, Writer, tolerate
from mdt_jax.training.hooks import Hook, Scores
from mdt_jax.training.initialization import Initialization
from mdt_jax.training.preemption import Interrupted, stop_signals
from mdt_jax.training.profiling import profiling
from mdt_jax.training.program import Program, make_program
from mdt_jax.training.sample_pictures import GRID, Pictures
from mdt_jax.training.trainer import StepHook, Trainer
from mdt_jax.training.wandb_runs import check_wandb
from mdt_jax.training.writers import open_events
from mdt_jax.types import Params


def train(
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  *,
  model: Model | None = None,
  objective: Objective | type[Objective] | None = None,
  optimizer: optax.GradientTransformation | None = None,
  source: Source | None = None,
  writers: Sequence[Writer] = (),
  hooks: Sequence[StepHook] = (),
) -> TrainState:
  """Trains a network for config.num_steps steps.

  If `workdir` holds a checkpoint, training resumes from the last one.

  Args:
    config: see `mdt_jax.config.default_config`.
    workdir: folder for checkpoints, TensorBoard events, metrics.jsonl, pictures, scores
      and config.json; a local one, or one in a bucket (gs://BUCKET/RUN).
    model, objective, optimizer, source: your own objects, which replace the objects
      that the config describes; see `mdt_jax.own_parts.OwnParts`. Pass the same objects
      to resume a run.
    writers: receive the same metrics and pictures as TensorBoard, on process 0 only;
      see `events.Writer`.
    hooks: called with (steps done, state) after each step. The next step overwrites the
      arrays of the state: copy an array to keep it. An exception of a hook ends the
      run.

  Returns:
    The state after the last step.

  Raises:
    SettingError: a setting is invalid (nothing is written then), too many steps were
      skipped, too many files of the data are unreadable, or the workdir was deleted.
    SaveError: config.save_failures saves in a row failed.
    Interrupted: the process received SIGINT, SIGTERM or SIGHUP, and the state is saved;
      or a reading process was killed, and a single process has saved the state.
    Exception: any other exception of the data, a step or a hook; a single process saves
      the state before it raises.
  """
  distributed.check_same_config(config)
  is_main = jax.process_index() == 0
  lock = None
  with contextlib.ExitStack() as stack:
    with distributed.together():
      workdir = absolute(output_folder("--workdir", workdir))
      experiment = build(
        config, model=model, objective=objective, optimizer=optimizer, source=source
      )
      check_eval(experiment.settings)
      _check_guidance(experiment)
      if is_main and (project := experiment.settings.log.wandb_project) is not None:
        check_wandb(project)
      experiment.read_autoencoder()
      inception = load_training_inception(experiment.settings)
    # Here the processes communicate: a file that one of them lacks is found above.
    with distributed.together():
      held = experiment.open()
      start_from = Initialization(experiment, workdir)
    with distributed.together():
      periodic = _make_hooks(experiment, workdir, inception)
      del inception
    settings = experiment.settings
    if settings.init.path is not None:
      distributed.check_same_weights(settings.init.path, settings.init.checksum)
    with distributed.together():
      if is_main:
        lock = stack.enter_context(locked(workdir))
    stop = stack.enter_context(stop_signals(settings.grace_seconds))
    profiler = stack.enter_context(profiling(settings, workdir))
    saved = stack.enter_context(contextlib.closing(_checkpoints(experiment, workdir)))
    stack.enter_context(sharding.use_mesh(experiment.mesh))
    program = make_program(experiment)
    state = _first_state(experiment, program, saved, start_from)
    start = int(state.step)
    logger.info("%s", _summary(experiment, held, state))
    _warn_of_absent_classes(experiment, held)
    _warn_of_settings_without_effect(settings)
    missing = [hook for hook in periodic if hook.is_missing(start)]
    if start >= settings.num_steps and not missing:
      logger.info(
        "nothing to do: %s is at step %d, and config.num_steps = %d",
        workdir,
        start,
        settings.num_steps,
      )
      return state
    events = Events()
    if is_main:
      events = open_events(workdir, experiment.settings, start, writers)
    stack.callback(events.close)
    trainer = Trainer(
      experiment,
      workdir,
      program,
      saved,
      periodic,
      events,
      stop,
      profiler,
      lock,
      hooks,
    )
    if trainer.run_hooks(missing, state):
      raise Interrupted(f"stopped at step {start}; its checkpoint is saved", stop)
    if start >= settings.num_steps:
      return state
    if is_main:
      with tolerate("config.json"):
        write_config(experiment.settings, workdir)
      with tolerate(class_labels.FILE):
        held.write(workdir)
    state = trainer.run(state)
    logger.info(
      "finished: %s holds the results; the last checkpoint is at step %d",
      workdir,
      settings.num_steps,
    )
    return state


def _make_hooks(
  experiment: Experiment, workdir: AnyPath, inception: Params
) -> list[Hook]:
  """The hooks that the settings ask for: pictures and scores."""
  settings = experiment.settings
  hooks: list[Hook] = []
  if settings.sample_every and settings.num_samples:
    hooks.append(Pictures(experiment, workdir / GRID))
  if settings.eval.every:
    evaluate = make_training_evaluator(experiment, inception)
    folder = workdir / "scores"
    hooks.append(Scores(settings.eval.every, settings.num_steps, folder, evaluate))
  return hooks


def _checkpoints(experiment: Experiment, workdir: AnyPath) -> Checkpoints:
  """The checkpoints of a run, with the run's settings."""
  settings = experiment.settings
  return Checkpoints(
    workdir,
    settings.checkpoints_to_keep,
    settings.checkpoint_keep_every or None,
    settings.save_failures,
    cleans=True,
  )


def _first_state(
  experiment: Experiment,
  program: Program,
  saved: Checkpoints,
  start_from: Initialization,
) -> TrainState:
  """The state of the last checkpoint; without one, that of weights or a random one."""
  if saved.latest_step() is not None:
    try:
      state = saved.restore(program.state, experiment)
    except NothingSavedError:
      logger.warning("the run was killed during its first save and starts again")
    else:
      logger.info("resuming from the checkpoint at step %d", int(state.step))
      start_from.skip(saved.settings(int(state.step)))
      return state
  return start_from.first_state(program)


def _check_guidance(experiment: Experiment) -> None:
  """Raises SettingError if the network cannot run the passes of config.sampling."""
  sampling = experiment.settings.sampling
  tokens = builders.build_token_shares(sampling)
  check_tokens(experiment.model, Guidance(sampling.cfg_scale, tokens=tokens), None)


def _warn_of_settings_without_effect(settings: Settings) -> None:
  """Warns of settings of the process gaussian in a run of another process."""
  if ignored := settings.diffusion.without_effect:
    process = settings.diffusion.process
    logger.warning(
      "no effect on the process %s: %s; its settings are in config.diffusion.arguments",
      process,
      ", ".join(f"config.diffusion.{name} = {v!r}" for name, v in ignored.items()),
    )


def _summary(experiment: Experiment, held: DataLabels, state: TrainState) -> str:
  """The text that the log shows at the start: network, parameters, data, devices."""
  table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
  count = jax.device_count()
  devices = f"{count} {jax.devices()[0].device_kind} device{'s' * (count > 1)}"
  if count > 1:
    shape = experiment.mesh.shape.items()
    devices += " as " + " x ".join(f"{axis} {n}" for axis, n in shape)
  data = f"{counted(len(experiment.source), 'image')}, {held.describe()}"
  name = experiment.model_name
  trained = _count_of_trained(state.params, experiment.frozen)
  return f"{name}\n{table}\n{trained}{data}; {experiment.objective.summary}; {devices}"


def _count_of_trained(params: Params, frozen: Collection[str]) -> str:
  """Counts the trained parameters; empty if all are trained."""
  if not frozen:
    return ""
  sizes = {path: leaf.size for path, leaf in flatten(params).items()}
  trained = sum(size for path, size in sizes.items() if path not in frozen)
  return f"trained: {trained:,} of {sum(sizes.values()):,} parameters; "


def _warn_of_absent_classes(experiment: Experiment, held: DataLabels) -> None:
  """Warns if the data holds fewer classes than the network has labels for."""
  model = experiment.model
  if model.conditioning.label is not None and len(held.labels) < model.num_classes:
    logger.warning(
      "the data holds %s of the %s classes of config.model.num_classes; pictures, "
      "samples and scores show these %s unless you name labels",
      f"{len(held.labels):,}",
      f"{model.num_classes:,}",
      f"{len(held.labels):,}",
    )
