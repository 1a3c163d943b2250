"""Folders for the hub: model card, local paths left out, errors that write nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml

from mdt_jax import Pipeline, SettingError
from mdt_jax.atomic import write_json
from mdt_jax.checkpoints.hub_uploads import push_to_hub, to_hub_folder
from mdt_jax.checkpoints.loading import save_model
from mdt_jax.config import write_config
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.experiment import Experiment
from mdt_jax.models.conditions import CONDITIONS, LabelCondition
from mdt_jax.settings import Settings
from mdt_jax.training.loop import train
from tests import forked, reference
from tests.cli.commands import assert_refused, run
from tests.pretrained.hub_cache import HubCache
from tests.training.tiny import tiny_dit_config

pytest.importorskip("huggingface_hub", reason="needs huggingface-hub of the test extra")

SECRET = "/home/someone/secret"  # a folder of this machine


def save_run(workdir, **settings):
  """Saves random parameters as the checkpoint of a DiT at step 7."""
  settings = Settings.from_config(tiny_dit_config(**settings))
  params = reference.random_params(Experiment(settings).model)
  save_model(workdir, settings, params, step=7)
  write_config(settings, workdir)
  return workdir


def card_of(workdir, folder, **options):
  """The YAML and the text of a model card."""
  to_hub_folder(workdir, folder, overwrite=True, **options)
  _, header, text = (folder / "README.md").read_text().split("---\n", 2)
  return yaml.safe_load(header), text


def listing(folder):
  return sorted(str(path) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("digits")
  save_run(
    workdir,
    **{
      "ema_decays": (0.9, 0.99),
      "data.path": f"{SECRET}/my_images/",
      "data.source": "images",
      "init.path": f"{SECRET}/old_run",
      "init.step": 400,
      "init.checksum": "0123abcd",
      "eval.reference": f"{SECRET}/reference.npz",
      "eval.inception": f"{SECRET}/inception.pth",
      "optimizer.name": "sgd",
      "optimizer.arguments": {
        "file": f"{SECRET}/momentum.json",
        "object": f"gs:/{SECRET}/momentum.json",
      },
    },
  )
  DataLabels(np.array([1, 4]), ["ant", "be|e"]).write(workdir)
  return workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run that was trained and scored, with two averages."""
  workdir = tmp_path_factory.mktemp("trained")
  scores = {"eval.every": 2, "eval.metrics": "frechet", "eval.num_images": 8}
  config = tiny_dit_config(
    num_steps=2, ema_decays=(0.9, 0.99), **scores, **{"eval.batch_size": 8}
  )
  train(config, workdir)
  return workdir


@pytest.fixture
def cache(tmp_path, monkeypatch):
  cache = HubCache(tmp_path / "hub")
  cache.use(monkeypatch)
  return cache


def test_card_describes_the_run(digits, tmp_path):
  header, text = card_of(digits, tmp_path / "digits", license="apache-2.0")
  assert header["license"] == "apache-2.0"
  assert header["library_name"] == "mdt_jax"
  assert header["pipeline_tag"] == "unconditional-image-generation"
  for line in (
    'pipeline = mdt_jax.Pipeline.from_pretrained("digits")',
    "images = pipeline([1])",
    "| data | `images`: `my_images` |",
    "| classes in the data | 2 classes: `ant`, `be/e` |",
    "| steps | 7 of 4 |",
    "| EMA decay of the parameters | 0.9 |",
    "| initialised from | `old_run`, step 400 (CRC-32 `0123abcd`) |",
    "| network | DiT |",
    "| `config.diffusion.prediction` | `epsilon` |",
    "| `config.sampling.num_steps` | `3` |",
  ):
    assert line in text.splitlines()
  assert "## Scores" not in text


def test_card_states_no_license_unless_asked(digits, tmp_path):
  assert "license" not in card_of(digits, tmp_path / "folder")[0]


def test_card_lists_the_scores_of_its_parameters(trained, tmp_path):
  workdir = shutil.copytree(trained, tmp_path / "run")
  drawn = {"method": "ddim", "num_steps": 20, "cfg_scale": 2.0, "ema_decay": 0.9}
  scores = {"scores": {"fid": 12.5}, "images": 500, "step": 2, "sampling": drawn}
  scores |= {"reference": f"{SECRET}/reference.npz", "checkpoint": SECRET}
  write_json(workdir / "evaluation" / "scores.json", scores)
  bits = {"step": 2, "ema_decay": 0.9, "held_out": True, "images": 64, "total_bpd": 3.5}
  write_json(workdir / "evaluation" / "bpd.json", bits)
  (in_training,) = (workdir / "scores").glob("step_*.json")
  frechet = json.loads(in_training.read_text())["eval/frechet"]
  _, text = card_of(workdir, tmp_path / "folder")
  for line in (
    f"| frechet | {frechet:.4f}, in training |",
    "| fid | 12.5000 (500 images, ddim, 20 steps, cfg_scale 2.0) |",
    "| bits per dimension | 3.5000 (64 held-out images) |",
  ):
    assert line in text.splitlines()
  assert SECRET not in text
  assert "## Scores" not in card_of(workdir, tmp_path / "folder", ema_decay=0.99)[1]


@pytest.mark.parametrize("found", ["{", "[1]", '{"step": 7, "sampling": 5}', "\x00"])
def test_damaged_scores_are_left_out(tmp_path, found):
  workdir = save_run(tmp_path / "run")
  for name in (
    "evaluation/scores.json",
    "evaluation/bpd.json",
    "scores/step_0000007.json",
  ):
    (workdir / name).parent.mkdir(exist_ok=True)
    (workdir / name).write_text(found)
  assert "## Scores" not in card_of(workdir, tmp_path / "folder")[1]


def test_no_path_of_the_machine_is_published(digits, tmp_path):
  folder = tmp_path / "folder"
  to_hub_folder(digits, folder)
  for path in folder.iterdir():
    content = path.read_bytes()
    for private in ("someone", str(digits), str(tmp_path)):
      assert private.encode() not in content, path.name
  settings = json.loads((folder / "config.json").read_text())["settings"]
  assert settings["data"]["path"] == "my_images"
  assert settings["init"]["path"] == "old_run"
  shown = {"file": "momentum.json", "object": "momentum.json"}
  assert settings["optimizer"]["arguments"] == shown


@pytest.mark.parametrize(
  ("vae", "kept"), [("org/vae", "org/vae"), (f"{SECRET}/vae", None), ("~/vae", None)]
)
def test_only_an_autoencoder_on_the_hub_is_published(tmp_path, vae, kept):
  data = {"data.source": "images", "data.path": "x", "data.vae": vae}
  workdir = save_run(tmp_path / "run", **data)
  to_hub_folder(workdir, tmp_path / "folder")
  assert (
    json.loads((tmp_path / "folder" / "config.json").read_text())["settings"]["data"][
      "vae"
    ]
    == kept
  )
  pipeline = Pipeline.from_pretrained(tmp_path / "folder", vae="none")
  assert not pipeline.draws_pixels  # its latents are no pixels


def test_average_and_visibility_are_chosen(digits, cache):
  with pytest.raises(SettingError, match=r"^ema_decay = 0\.5"):
    push_to_hub(digits, "org/digits", ema_decay=0.5)
  assert not cache.uploads
  push_to_hub(digits, "org/digits", private=True)
  ((repository, private, message),) = cache.uploads
  assert (repository, private) == ("org/digits", True)
  assert "step 7" in message
  assert Pipeline.from_pretrained("org/digits").config.sampling.ema_decay == 0.9


# Errors.


@pytest.mark.parametrize(
  ("setting", "changes"),
  [
    ("config.model.input_size", {"model.input_size": (8, 16), "data.source": "npz"}),
    ("config.model.condition", {"model.condition": "own_of_hub"}),
  ],
)
def test_network_that_files_cannot_hold_is_not_uploaded(
  tmp_path, cache, monkeypatch, setting, changes
):
  class Own(LabelCondition):
    pass

  monkeypatch.setitem(CONDITIONS, "own_of_hub", Own)
  workdir = save_run(tmp_path / "run", **changes)
  before = listing(tmp_path)
  for publish in (
    lambda: push_to_hub(workdir, "org/name"),
    lambda: to_hub_folder(workdir, tmp_path / "folder"),
  ):
    with pytest.raises(SettingError) as caught:
      publish()
    assert caught.value.setting == setting
  assert not cache.uploads
  assert listing(tmp_path) == before


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_refusal_of_the_hub_is_one_line(digits, cache, monkeypatch, step):
  def refuse(*_, **__):
    raise OSError("403 Forbidden:\nyou have no right\nto create a model")

  import huggingface_hub

  api = huggingface_hub.HfApi()
  monkeypatch.setattr(api, step, refuse)
  monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
  with pytest.raises(SettingError, match=r"^repository = .*403 Forbidden") as caught:
    push_to_hub(digits, "org/name")
  assert "\n" not in str(caught.value)
  assert not cache.uploads


def test_nonempty_folder_is_refused(digits, tmp_path):
  (tmp_path / "mine.txt").write_text("kept")
  with pytest.raises(SettingError, match=r"^folder = .*must be an empty folder"):
    to_hub_folder(digits, tmp_path)
  assert listing(tmp_path) == [str(tmp_path / "mine.txt")]
  to_hub_folder(digits, tmp_path, overwrite=True)
  assert (tmp_path / "mine.txt").read_text() == "kept"


def test_folder_of_a_run_is_not_written_to(digits):
  before = listing(digits)
  with pytest.raises(SettingError, match=r"^folder = .*folder of a run"):
    to_hub_folder(digits, digits, overwrite=True)
  assert listing(digits) == before


@pytest.mark.parametrize("license", ["", "Apache 2", "mit\nlibrary_name: other"])
def test_text_that_is_no_license_is_refused(digits, tmp_path, license):
  with pytest.raises(SettingError) as caught:
    to_hub_folder(digits, tmp_path / "folder", license=license)
  assert caught.value.setting == "license"
  assert not listing(tmp_path)


# The command.


def test_command_writes_the_folder(trained, tmp_path):
  flags = ["--to_hub", f"--input={trained}", f"--output={tmp_path / 'folder'}"]
  code, out, err = run("mdt_jax.convert", *flags, "--license=mit", "--ema_decay=0.99")
  assert code == 0, err
  assert "step 2" in out
  pipeline = Pipeline.from_pretrained(tmp_path / "folder")
  expected = Pipeline.from_checkpoint(trained, ema_decay=0.99)
  assert pipeline.config.sampling.ema_decay == 0.99
  np.testing.assert_array_equal(pipeline.draw([3, 1]), expected.draw([3, 1]))
  assert "license: mit" in (tmp_path / "folder" / "README.md").read_text()


def push(folder, *flags):
  """Runs mdt_jax.convert with a hub that is a folder."""
  cache = HubCache(folder)
  with pytest.MonkeyPatch.context() as monkeypatch:
    cache.use(monkeypatch)
    forked.run_module("mdt_jax.convert", *flags)


def test_command_pushes_what_a_run_starts_from(digits, tmp_path):
  cache = HubCache(tmp_path / "hub")
  process = forked.Forked(push, cache.folder, "--push=org/x", f"--input={digits}")
  assert process.end() == 0, process.err
  assert "https://huggingface.co/org/x" in process.out
  code, out, err = run(
    "mdt_jax.main",
    f"--config={forked.ROOT / 'tests' / 'faults' / 'run_config.py'}",
    f"--workdir={tmp_path / 'new'}",
    "--config.init.path=hf://org/x",
    "--config.init.partial",
    environment=cache.environment,
  )
  assert code == 0, err
  assert "starting from hf://org/x" in out


@pytest.mark.parametrize(
  ("flags", "texts"),
  [
    (["--push=name"], ["--push = 'name'", "ORG/NAME"]),
    (["--push="], ["--push = ''", "ORG/NAME"]),
    (["--push=org/name"], ["--push = 'org/name'", "cannot be uploaded"]),
    (["--push=org/name", "--output=x"], ["--output = 'x'", "--push"]),
    (["--push=org/name", "--to_torch"], ["--to_torch", "--push"]),
    (["--to_hub"], ["--output must be given"]),
    (["--to_hub", "--output=x", "--private"], ["--private", "--push"]),
    (["--to_torch", "--output=x.pt", "--license=mit"], ["--license", "--push"]),
  ],
  ids=" ".join,
)
def test_command_refuses_flags_in_one_line(digits, tmp_path, flags, texts):
  environment = HubCache(tmp_path / "hub").environment  # no network
  options = {"environment": environment, "folder": tmp_path}
  assert_refused(run("mdt_jax.convert", f"--input={digits}", *flags, **options), *texts)
  assert not listing(tmp_path)
