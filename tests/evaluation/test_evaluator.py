"""config.eval: scores of the averaged parameters during training."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest

from mdt_jax.checkpoints.loading import Checkpoint, load_ema
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.data.sources import DigitsSource
from mdt_jax.errors import SettingError
from mdt_jax.evaluation import evaluator, job, scores
from mdt_jax.evaluation.evaluator import (
  Evaluator,
  TrainingEvaluator,
  draw_images,
  make_training_evaluator,
)
from mdt_jax.evaluation.image_streams import GeneratedImages, NpzImages
from mdt_jax.evaluation.summary import Summary
from mdt_jax.experiment import build
from mdt_jax.sampling.generator import make_generator
from mdt_jax.training import loop
from tests import reference
from tests.data.folders import write_image
from tests.training.tiny import tiny_dit_config

EVAL = {
  "num_steps": 3,
  "eval.every": 2,
  "eval.metrics": "frechet,accuracy",
  "eval.num_images": 20,
  "eval.batch_size": 8,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  loop.train(tiny_dit_config(**EVAL), folder)
  return folder


def read_scalars(workdir):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  from tensorboard.util.tensor_util import make_ndarray

  events = EventAccumulator(str(workdir / "tensorboard"), {"tensors": 0})
  events.Reload()
  return {
    tag: {event.step: float(make_ndarray(event.tensor_proto)) for event in points}
    for tag, points in (
      (tag, events.Tensors(tag)) for tag in events.Tags()["tensors"] if "eval/" in tag
    )
  }


def test_scores_are_logged_at_eval_every_and_at_the_last_step(workdir):
  scalars = read_scalars(workdir)
  assert set(scalars) == {"eval/frechet", "eval/accuracy"}
  assert all(set(points) == {2, 3} for points in scalars.values())


def test_scores_use_the_averaged_parameters(workdir):
  checkpoint = load_ema(workdir)
  evaluate = make_training_evaluator(checkpoint.experiment)
  found = evaluate(3, {"0.9": checkpoint.params})
  for tag, points in read_scalars(workdir).items():
    assert points[3] == pytest.approx(found[tag], rel=1e-3), tag


def test_eval_reference_replaces_the_data_set(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), np.uint8)
  np.savez(tmp_path / "real.npz", images, np.arange(30) % 10)
  experiment = build(
    tiny_dit_config(
      **EVAL,
      **{"eval.reference": str(tmp_path / "real.npz"), "data.source": "images"},
    )
  )
  params = reference.random_params(experiment.model)
  found = make_training_evaluator(experiment)(1, {"0.9": params})
  generator = make_generator(experiment.model, experiment.sampler)
  generated = draw_images(experiment, generator, params, ["frechet"], 20, seed=0)
  evaluate = Evaluator.create(["frechet"], reference=str(tmp_path / "real.npz"))
  assert found["eval/frechet"] == pytest.approx(evaluate(generated)["frechet"])


@pytest.mark.parametrize(
  ("metrics", "setting", "argument", "expected"),
  [
    (["frechet"], None, None, "balanced"),
    (["is"], None, None, "random"),
    (["frechet", "fid"], None, None, "random"),
    (["is"], "balanced", None, "balanced"),
    (["frechet"], "random", None, "random"),
    (["is"], "random", "balanced", "balanced"),
    (["is"], "balanced", "random", "random"),
  ],
)
def test_labels_are_random_for_scores_of_inception(
  metrics, setting, argument, expected
):
  experiment = build(tiny_dit_config(**{"eval.labels": setting}))
  drawn = draw_images(experiment, None, None, metrics, 40, seed=3, labels=argument)
  is_balanced = drawn.labels.tolist() == [*range(10)] * 4
  assert is_balanced == (expected == "balanced")
  assert len(drawn) == 40 and set(drawn.labels) <= set(range(10))


def test_random_labels_are_uniform_and_independent():
  """As torch.randint(0, num_classes) draws them in the released scripts."""
  experiment = build(tiny_dit_config())
  drawn = draw_images(experiment, None, None, ["is"], 50_000, seed=0).labels
  counts = np.bincount(drawn, minlength=10)
  pairs = np.bincount(drawn[:-1] * 10 + drawn[1:], minlength=100)
  # 99.9% of samples of a chi-squared variable lie below these.
  for found, limit in ((counts, 27.9), (pairs, 149)):
    mean = found.sum() / len(found)
    assert np.sum((found - mean) ** 2 / mean) < limit
  # Balanced labels would have equal counts.
  assert counts.std() > 20
  again = draw_images(experiment, None, None, ["is"], 50_000, seed=1).labels
  assert (drawn != again).mean() > 0.8


def test_reference_folder_has_the_labels_of_the_run(tmp_path):
  for name in ("1", "10", "2"):
    write_image(tmp_path / f"{name}/0.png", int(name), mode="L")
  held = DataLabels(np.arange(3), ["1", "10", "2"])
  evaluate = Evaluator.create(["accuracy"], reference=str(tmp_path), held=held)
  assert evaluate.real.labels is not None
  assert sorted(evaluate.real.labels.tolist()) == [0, 1, 2]


def test_samples_and_reference_of_a_command_have_the_labels_of_the_run(
  tmp_path, monkeypatch
):
  names = ["ant", "bee", "cow"]
  for name in names[1:]:
    write_image(tmp_path / f"{name}/0.png", mode="L")
  found = []

  def note(images, *arguments, **options):
    found.append(np.concatenate([labels for _, labels in images.batches(8)]))
    if len(found) == 2:
      raise Noted
    return Summary({}, {})

  class Noted(Exception):
    pass

  monkeypatch.setattr(scores, "summarize", note)
  experiment = build(tiny_dit_config())
  experiment.data_labels = DataLabels(np.arange(3), names)
  path = str(tmp_path)
  checkpoint = Checkpoint(experiment, None, 0)
  with pytest.raises(Noted):
    job.score_images(["accuracy"], checkpoint, samples=path, reference=path)
  assert [labels.tolist() for labels in found] == [[1, 2], [1, 2]]


def test_npz_file_is_scored_against_a_data_set(tmp_path):
  digits = DigitsSource()
  images = np.stack([digits[i]["image"] for i in range(len(digits))])
  np.savez(tmp_path / "digits.npz", images)
  evaluate = Evaluator.create(["frechet"], open_data=lambda: digits)
  found = evaluate(NpzImages(tmp_path / "digits.npz"))
  assert found["frechet"] == pytest.approx(0, abs=1e-6)


def test_inception_score_does_not_open_the_data_set(monkeypatch):
  def fail():
    raise AssertionError

  monkeypatch.setattr(evaluator, "load_inception", lambda path, setting: {})
  evaluate = Evaluator.create(["is"], open_data=fail, inception="weights")
  assert evaluate.real == Summary({}, {})


def test_missing_reference_is_refused():
  with pytest.raises(SettingError, match="reference = None: must be given"):
    Evaluator.create(["frechet"])


@pytest.fixture(scope="module")
def references(tmp_path_factory):
  folder = tmp_path_factory.mktemp("references")
  images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
  grey, labels = images[..., :1], np.arange(30) % 10
  np.savez(folder / "colour.npz", images, labels)
  np.savez(folder / "unlabelled.npz", grey)
  np.savez(folder / "sevens.npz", grey, np.full(30, 7))
  np.savez(folder / "three.npz", grey[:3], labels[:3])
  return folder


@pytest.mark.parametrize(
  ("metrics", "num_images", "reference", "message"),
  [
    ("diversity", 10, "sevens", r"num_images = 10: diversity needs "),
    ("diversity", 20, "three", r"num_images = 20: diversity needs "),
    ("accuracy", 10, "unlabelled", r"reference = .*: accuracy needs labels"),
    ("accuracy", 10, "sevens", r"reference = .*: accuracy needs .* at least 2 classes"),
    ("accuracy", 10, "colour", r"reference = .* 192 .* 64: "),
    ("frechet", 10, "colour", r"reference = .* 192 .* 64: "),
  ],
)
def test_impossible_scores_are_refused_before_training(
  references, metrics, num_images, reference, message
):
  config = tiny_dit_config(
    **EVAL
    | {
      "eval.metrics": metrics,
      "eval.num_images": num_images,
      "eval.reference": str(references / f"{reference}.npz"),
    }
  )
  with pytest.raises(SettingError, match=r"^config\.eval\..*" + message):
    make_training_evaluator(build(config))


def test_latents_without_autoencoder_are_refused_before_training():
  config = tiny_dit_config(**EVAL, **{"data.source": "latents"})
  with pytest.raises(SettingError, match=r"config\.data\.vae = None: must be given"):
    make_training_evaluator(build(config))


def read_scores(workdir):
  return {p.name: json.loads(p.read_text()) for p in (workdir / "scores").iterdir()}


def test_run_stopped_while_scoring_resumes_to_the_same_scores(
  workdir, tmp_path, monkeypatch
):
  batches = GeneratedImages.batches

  def stop_after_one(self, batch_size):
    for i, batch in enumerate(batches(self, batch_size)):
      if i == 1:
        signal.raise_signal(signal.SIGTERM)
      yield batch

  config = tiny_dit_config(**EVAL, checkpoint_every=100)
  with monkeypatch.context() as patch:
    patch.setattr(GeneratedImages, "batches", stop_after_one)
    with pytest.raises(loop.Interrupted, match="after step 2"):
      loop.train(config, tmp_path)
  assert load_ema(tmp_path).step == 2
  assert not (tmp_path / "scores").exists()
  loop.train(config, tmp_path)
  assert read_scores(tmp_path) == read_scores(workdir)


def test_missing_last_scores_are_computed_once_on_restart(workdir, caplog):
  before = read_scores(workdir)
  assert set(before) == {"step_0000002.json", "step_0000003.json"}
  last = workdir / "scores" / "step_0000003.json"
  last.unlink()
  loop.train(tiny_dit_config(**EVAL), workdir)
  assert read_scores(workdir) == before
  made = last.stat().st_mtime_ns
  with caplog.at_level("INFO", "mdt_jax"):
    loop.train(tiny_dit_config(**EVAL), workdir)
  assert "nothing to do" in caplog.text
  assert last.stat().st_mtime_ns == made


def test_scores_that_kill_the_process_are_retried_once(tmp_path, monkeypatch, caplog):
  class Killed(BaseException):
    """Stands for a kill by the system when memory runs out."""

  def kill(*_):
    raise Killed

  config = tiny_dit_config(**EVAL, checkpoint_every=100)
  with monkeypatch.context() as patch:
    patch.setattr(TrainingEvaluator, "__call__", kill)
    for _ in range(2):  # At step 2, which is saved, and at the next start.
      with pytest.raises(Killed):
        loop.train(config, tmp_path)
    assert load_ema(tmp_path).step == 2
  loop.train(config, tmp_path)
  assert "no scores of step 2: " in caplog.text
  assert "step_0000003.json" in os.listdir(tmp_path / "scores")


def test_run_continues_after_scoring_fails(tmp_path, monkeypatch, caplog):
  score, left = scores.score, [SettingError("real images", None, "needs their labels")]

  def fail_once(*args):
    if left:
      raise left.pop()
    return score(*args)

  monkeypatch.setattr(scores, "score", fail_once)
  assert int(loop.train(tiny_dit_config(**EVAL), tmp_path).step) == 3
  assert "NO SCORES OF STEP 2: real images = None: needs their labels" in caplog.text
  assert set(read_scores(tmp_path)) == {"step_0000003.json"}


@pytest.mark.parametrize(
  ("setting", "value", "message"),
  [
    ("eval.metrics", "fid", r"config\.eval\.metrics = 'fid': needs the weights"),
    ("eval.metrics", "kid", r"config\.eval\.metrics = 'kid': accepted are"),
    ("eval.metrics", "", r"config\.eval\.metrics = ''"),
    ("eval.every", -1, r"config\.eval\.every = -1: must be at least 0"),
    ("eval.num_images", 1, r"config\.eval\.num_images = 1: must be at least 2"),
    ("eval.batch_size", 0, r"config\.eval\.batch_size = 0: must be at least 1"),
    ("eval.reference", "nowhere.npz", r"config\.eval\.reference = 'nowhere\.npz'"),
    ("eval.inception", "nowhere.pth", r"config\.eval\.inception = 'nowhere\.pth'"),
  ],
)
def test_invalid_eval_setting_is_refused_before_writing(
  tmp_path, setting, value, message
):
  config = tiny_dit_config(**(EVAL | {setting: value}))
  with pytest.raises(SettingError, match=message):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
