"""The commands as a user runs them: exit codes, one-line errors, files."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mdt_jax.buckets import list_objects
from mdt_jax.checkpoints.loading import save_model
from mdt_jax.experiment import Experiment
from mdt_jax.pretrained.tensors import read_tensors
from mdt_jax.settings import Settings
from tests import forked, reference
from tests.cli.commands import assert_refused, run
from tests.training.tiny import tiny_dit_config

ROOT = Path(__file__).parents[1]
SETTINGS = {
  "num_steps": 2,
  "batch_size": 8,
  "model.name": "DiT-S/2",  # test_rectangles.py runs commands with MDTv2
  "model.hidden_size": 16,
  "model.depth": 4,
  "model.num_heads": 2,
  "model.unroll": 1,
  "optimizer.warmup_steps": 0,
  "ema_decays": (0.9, 0.5),
  "sampling.num_steps": 3,
  "checkpoint_every": 2,
  "sample_every": 0,
  "eval.every": 0,
}


def train(workdir, **overrides):
  flags = [f"--config.{name}={value}" for name, value in (SETTINGS | overrides).items()]
  config = ROOT / "configs" / "digits.py"
  return ["mdt_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained")
  code, out, err = run(*train(workdir))
  assert code == 0, err
  assert "step 2/2" in out
  return workdir


@pytest.mark.parametrize(
  ("flag", "texts"),
  [
    (
      "--config.model.name=MDT-M/2",
      ["config.model.name = 'MDT-M/2'", "NETWORK-SIZE/PATCH"],
    ),
    ("--config.data.source=images", ["config.data.path = None: must be given"]),
    ("--config.data.path=photos", ["config.data.path = 'photos': must be left out"]),
  ],
)
def test_bad_training_flags_are_refused_in_one_line(tmp_path, flag, texts):
  assert_refused(run(*train(tmp_path / "run"), flag), *texts)
  assert not (tmp_path / "run").exists()


def test_workdir_of_another_model_is_refused_and_unchanged(trained):
  before = sorted(trained.rglob("*"))
  result = run(*train(trained, **{"model.depth": 6}))
  assert_refused(result, str(trained), "config.model.depth was 4, now 6")
  assert sorted(trained.rglob("*")) == before


def test_second_run_logs_the_step_it_resumes_from(trained):
  code, out, err = run(*train(trained, num_steps=4))
  assert code == 0, err
  assert "resuming from the checkpoint at step 2" in out


def test_interrupted_training_resumes_without_losing_a_step(tmp_path):
  settings = {"num_steps": 5000, "log_every": 1, "checkpoint_every": 5000}
  process = forked.command(*train(tmp_path, **settings))
  process.wait_for("^step 3/")
  process.signal(signal.SIGINT)
  assert process.end() == 130, process.err
  (saved,) = (int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert f"stopped after step {saved};" in process.out
  code, out, err = run(*train(tmp_path, num_steps=saved + 2, log_every=1))
  assert code == 0, err
  steps = [line.split()[1] for line in out.splitlines() if line.startswith("step ")]
  total = saved + 2
  assert steps == [f"{saved + 1}/{total}", f"{total}/{total}"]


def sample(trained, output, *flags):
  return run("mdt_jax.sample", f"--checkpoint={trained}", f"--output={output}", *flags)


def test_sampling_writes_a_grid_and_arrays(trained, tmp_path):
  flags = ["--labels=3,1", "--num_images=5", "--ema_decay=0.5"]
  code, _, err = sample(trained, tmp_path, *flags)
  assert code == 0, err
  made_of = json.loads((tmp_path / "samples.json").read_text())
  assert made_of["sampling.ema_decay"] == 0.5
  with np.load(tmp_path / "samples.npz") as data:
    assert data["arr_0"].shape == (5, 8, 8, 1)
    assert data["arr_0"].dtype == np.uint8
    assert data["arr_1"].tolist() == [3, 1, 3, 1, 3]
  with Image.open(tmp_path / "samples.png") as grid:
    assert grid.mode == "RGB"


def test_inpainting_keeps_visible_pixels(trained, tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
  mask = np.zeros((8, 8), np.uint8)
  mask[:, 4:] = 255
  Image.fromarray(image).save(tmp_path / "image.png")
  Image.fromarray(mask).save(tmp_path / "mask.png")
  given = [f"--inpaint={tmp_path / 'image.png'}", f"--mask={tmp_path / 'mask.png'}"]
  code, _, err = sample(trained, tmp_path, *given, "--labels=3,1", "--png")
  assert code == 0, err
  with np.load(tmp_path / "samples.npz") as data:
    painted = data["arr_0"][..., 0]
  assert (painted[:, :, :4] == image[:, :4]).all()
  assert (painted[:, :, 4:] != image[:, 4:]).any()
  assert len(list((tmp_path / "png").glob("*.png"))) == 2


@pytest.mark.parametrize(
  ("flag", "texts"),
  [
    ("--labels=3,11", ["--labels = 11", "0 … 9"]),
    ("--labels=three", ["--labels = 'three'"]),
    ("--num_images=0", ["--num_images = 0", "[1, "]),
    ("--num_steps=2000", ["--num_steps = 2000"]),
    ("--steps=2000", ["--steps = 2000"]),
    ("--method=plms", ["--method = 'plms'", "ddpm, ddim"]),
    ("--sampler=plms", ["--sampler = 'plms'", "ddpm, ddim"]),
    ("--batch_size=0", ["--batch_size = 0", "[1, "]),
    ("--cfg_interval=0.1", ["--cfg_interval = (0.1,)", "(low, high)"]),
    ("--mask=mask.png", ["--mask = 'mask.png'", "inpaint"]),
    ("--inpaint=nowhere.png", ["--inpaint = 'nowhere.png'", "must be a file"]),
    ("--edit=README.md", ["--edit = 'README.md'", "image"]),
    ("--checkpoint=nowhere", ["--checkpoint = 'nowhere'"]),
  ],
)
def test_bad_sampling_flags_are_refused_in_one_line(trained, tmp_path, flag, texts):
  assert_refused(sample(trained, tmp_path / "out", flag), *texts)
  assert not (tmp_path / "out").exists()


def test_released_checkpoint_is_converted_and_sampled(tmp_path):
  source = ROOT / "tests" / "fixtures" / "mdt_v2.pt"
  folder, back = tmp_path / "run", tmp_path / "back.safetensors"
  code, out, err = run("mdt_jax.convert", f"--input={source}", f"--output={folder}")
  assert code == 0, err
  assert f"--checkpoint={folder}" in out
  code, _, err = sample(folder, tmp_path / "samples", "--labels=1", "--steps=2")
  assert code == 0, err
  with np.load(tmp_path / "samples" / "latents.npz") as data:
    assert data["arr_0"].shape == (1, 12, 12, 4)
  code, _, err = run(
    "mdt_jax.convert", "--to_torch", f"--input={folder}", f"--output={back}"
  )
  assert code == 0, err
  assert back.exists()


def test_conversion_of_a_damaged_file_is_refused_in_one_line(tmp_path):
  (tmp_path / "model.pt").write_text("no checkpoint")
  flags = [f"--input={tmp_path / 'model.pt'}", f"--output={tmp_path / 'run'}"]
  assert_refused(run("mdt_jax.convert", *flags), "--input", "model.pt")
  assert not (tmp_path / "run").exists()


def test_evaluate_writes_the_variational_bound(trained, tmp_path):
  flags = ["--num_images=4", "--steps=3", f"--output={tmp_path}"]
  code, out, err = run("mdt_jax.evaluate", f"--checkpoint={trained}", *flags)
  assert code == 0, err
  assert "bits a dimension" in out
  found = json.loads((tmp_path / "bpd.json").read_text())
  assert found["images"] == 4
  assert len(found["vb"]) == 3
  assert found["total_bpd"] == pytest.approx(sum(found["vb"]) + found["prior_bpd"])


@pytest.mark.parametrize(
  ("flag", "texts"),
  [
    ("--metrics=fad", ["--metrics = 'fad'", "bpd"]),
    ("--num_images=0", ["--num_images = 0"]),
    ("--data_path=nowhere --data_source=images", ["nowhere"]),
    ("--data_path=nowhere", ["--data_path = 'nowhere': must be left out", "images"]),
    (
      "--metrics=diversity --num_images=10",
      ["--num_images = 10: diversity needs "],
    ),
    ("--steps=0", ["--steps = 0: must lie in [1, config.diffusion.num_timesteps"]),
    ("--vae=folder", ["--vae = 'folder': must be left out: this model draws pixels"]),
  ],
)
def test_bad_evaluation_flags_are_refused_in_one_line(trained, tmp_path, flag, texts):
  output = tmp_path / "out"
  flags = [f"--checkpoint={trained}", f"--output={output}", *flag.split()]
  assert_refused(run("mdt_jax.evaluate", *flags), *texts)
  assert not output.exists()


def save_tiny(workdir, **settings):
  experiment = Experiment(Settings.from_config(tiny_dit_config(**settings)))
  params = reference.random_params(experiment.model)
  save_model(workdir, experiment.settings, params)
  return f"--checkpoint={workdir}"


@pytest.mark.parametrize(
  ("metrics", "text"),
  [("frechet", "--vae = None: must be"), ("bpd", "--data_path = None: must be")],
)
def test_flag_that_a_run_on_latents_needs_is_named(tmp_path, metrics, text):
  checkpoint = save_tiny(tmp_path, **{"data.source": "latents"})
  assert_refused(run("mdt_jax.evaluate", checkpoint, f"--metrics={metrics}"), text)


def test_conversion_suggests_no_autoencoder_for_one_channel(tmp_path):
  save_tiny(tmp_path / "run")
  file = f"{tmp_path / 'grey.safetensors'}"
  flags = ["--to_torch", f"--input={tmp_path / 'run'}", f"--output={file}"]
  assert run("mdt_jax.convert", *flags)[0] == 0
  back = [f"--input={file}", f"--output={tmp_path / 'back'}"]
  code, out, err = run("mdt_jax.convert", *back)
  assert code == 0, err
  assert "--checkpoint=" in out and "--vae=" not in out


def test_evaluate_uses_all_of_other_data(tmp_path):
  checkpoint = save_tiny(tmp_path / "run", **{"data.validation": 0.5})
  (tmp_path / "data").mkdir()
  for i in range(4):
    Image.new("L", (8, 8), 60 * i).save(tmp_path / "data" / f"{i}.png")
  other = ["--data_source=images", f"--data_path={tmp_path / 'data'}", "--steps=1"]
  code, _, err = run("mdt_jax.evaluate", checkpoint, "--metrics=bpd", *other)
  assert code == 0, err
  found = json.loads((tmp_path / "run" / "evaluation" / "bpd.json").read_text())
  assert found["images"] == 4


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sampled")
  rng = np.random.default_rng(0)
  labels = np.arange(40) % 10
  np.savez(folder / "grey.npz", rng.integers(0, 256, (40, 8, 8, 1), np.uint8), labels)
  np.savez(folder / "colour.npz", rng.integers(0, 256, (4, 32, 32, 3), np.uint8))
  np.savez(folder / "floats.npz", np.full((9, 8, 8, 3), np.nan))
  return folder


def test_samples_in_a_file_are_scored_against_the_data_of_a_run(
  trained, sampled, tmp_path
):
  flags = [f"--samples={sampled / 'grey.npz'}", f"--output={tmp_path}"]
  code, out, err = run("mdt_jax.evaluate", f"--checkpoint={trained}", *flags)
  assert code == 0, err
  found = json.loads((tmp_path / "scores.json").read_text())
  assert found["images"] == 40
  assert list(found["scores"]) == ["frechet", "accuracy", "diversity"]
  for name, value in found["scores"].items():
    assert [name, f"{value:.4f}"] in [line.split() for line in out.splitlines()]


def test_evaluate_samples_and_scores_a_checkpoint(trained, tmp_path):
  flags = ["--metrics=frechet,bpd", "--num_images=12"]
  flags += ["--sampling=num_steps=2,cfg_interval=0.2,0.8,clip_denoised=true"]
  flags += [f"--output={tmp_path}", f"--save_statistics={tmp_path / 'real.npz'}"]
  evaluate = ["mdt_jax.evaluate", f"--checkpoint={trained}", "--ema_decay=0.5"]
  code, _, err = run(*evaluate, *flags)
  assert code == 0, err
  found = json.loads((tmp_path / "scores.json").read_text())
  bound = json.loads((tmp_path / "bpd.json").read_text())
  assert found["images"] == 12
  assert found["sampling"]["num_steps"] == 2
  assert found["sampling"]["cfg_interval"] == [0.2, 0.8]
  assert found["sampling"]["clip_denoised"] is True
  assert found["sampling"]["ema_decay"] == bound["ema_decay"] == 0.5
  assert found["step"] == bound["step"]
  flags = [f"--reference={tmp_path / 'real.npz'}", *flags[1:4], "--metrics=frechet"]
  code, _, err = run(*evaluate, *flags)
  assert code == 0, err
  again = json.loads((tmp_path / "scores.json").read_text())
  assert again["scores"] == {"frechet": found["scores"]["frechet"]}


def test_evaluate_computes_inception_scores_with_converted_weights(sampled, tmp_path):
  from safetensors.numpy import save_file

  source, weights = tmp_path / "fid.safetensors", tmp_path / "inception.safetensors"
  save_file(reference.inception_tensors(), source)
  flags = [f"--input={source}", f"--output={weights}"]
  code, _, err = run("mdt_jax.convert", "--inception", *flags)
  assert code == 0, err
  colour = sampled / "colour.npz"
  flags = [f"--samples={colour}", f"--reference={colour}", f"--inception={weights}"]
  flags += [f"--output={tmp_path}", "--batch_size=4"]
  flags += ["--metrics=fid,is,precision,recall"]
  code, _, err = run("mdt_jax.evaluate", *flags)
  assert code == 0, err
  found = json.loads((tmp_path / "scores.json").read_text())["scores"]
  assert found["fid"] == pytest.approx(0, abs=1e-6)
  assert found["is"] >= 1
  assert (found["precision"], found["recall"]) == (1, 1)


def test_evaluate_without_images_is_refused_in_one_line():
  result = run("mdt_jax.evaluate")
  assert_refused(result, "--samples = None: must be given, or --checkpoint")


@pytest.mark.parametrize(
  ("flag", "texts"),
  [
    ("--samples=nowhere.npz", ["--samples = 'nowhere.npz'", "must be a file"]),
    ("--samples={}/floats.npz", ["image 0 holds numbers from nan", "floats.npz"]),
    ("--samples={}/grey.npz --metrics=fid", ["--metrics = 'fid': needs the weights"]),
    ("--samples={}/grey.npz --metrics=bpd", ["--metrics = 'bpd'", "--checkpoint"]),
    ("--metrics=frechet", ["--samples = None: must be given, or --checkpoint"]),
  ],
)
def test_bad_sample_files_are_refused_in_one_line(sampled, tmp_path, flag, texts):
  flags = [text.format(sampled) for text in flag.split()]
  flags += [f"--reference={sampled / 'grey.npz'}", f"--output={tmp_path / 'out'}"]
  result = run("mdt_jax.evaluate", *flags)
  assert_refused(result, *texts)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("flag", "texts"),
  [
    ("--steps=3", ["--steps = 3", "--sampling=num_steps=3"]),
    ("--sampling=steps=2", ["--sampling = 'steps'", "num_steps"]),
    ("--sampling=cfg_interval=0.2,many", ["cfg_interval = '0.2,many'", "tuple"]),
    ("--sampling=num_steps=many", ["config.sampling.num_steps = 'many'", "int"]),
  ],
)
def test_bad_settings_of_evaluated_samples_are_refused_in_one_line(
  trained, tmp_path, flag, texts
):
  flags = ["--metrics=frechet", flag, f"--output={tmp_path / 'out'}"]
  result = run("mdt_jax.evaluate", f"--checkpoint={trained}", *flags)
  assert_refused(result, *texts)
  assert not (tmp_path / "out").exists()


VAE = ROOT / "tests" / "fixtures" / "vae"


def encode(output, *flags):
  return run("mdt_jax.encode", f"--output={output}", *flags)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
  """Two classes of two images each, and one that is cut short."""
  folder = tmp_path_factory.mktemp("photographs")
  rng = np.random.default_rng(0)
  for name in ("ant/1.png", "ant/2.png", "bee/1.png", "bee/2.png", "bee/cut.png"):
    (folder / name).parent.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(folder / name)
  cut = folder / "bee" / "cut.png"
  cut.write_bytes(cut.read_bytes()[:200])
  return folder


@pytest.fixture(scope="module")
def encoded(photographs, tmp_path_factory):
  output = tmp_path_factory.mktemp("encoded")
  code, out, err = encode(
    output, f"--source={photographs}", f"--vae={VAE}", "--image_size=16"
  )
  assert code == 0, err
  assert "cut.png" in out
  assert f"4 images in {output}, 1 left out" in out
  return output


def test_finished_latent_set_is_not_encoded_again(photographs, encoded):
  before = sorted((path, path.stat().st_mtime_ns) for path in encoded.iterdir())
  code, out, err = encode(
    encoded, f"--source={photographs}", f"--vae={VAE}", "--image_size=16"
  )
  assert code == 0, err
  assert "nothing to do" in out
  assert sorted((p, p.stat().st_mtime_ns) for p in encoded.iterdir()) == before


def test_encode_verifies_a_set_and_writes_statistics(encoded, tmp_path):
  copy = shutil.copytree(encoded, tmp_path / "set")
  code, out, err = encode(copy, "--verify", "--statistics")
  assert code == 0, err
  assert "4 images" in out and "every checksum agrees" in out
  found = json.loads((copy / "statistics.json").read_text())
  assert len(found["mean"]) == len(found["deviation"]) == 4


def test_reference_batch_has_the_format_of_adm(photographs, tmp_path):
  path = tmp_path / "reference.npz"
  code, _, err = run(
    "mdt_jax.encode",
    f"--source={photographs}",
    f"--reference_batch={path}",
    "--image_size=8",
    "--num_images=3",
  )
  assert code == 0, err
  with np.load(path) as data:
    # The last of the three cannot be read.
    assert (data["arr_0"].shape, data["arr_0"].dtype) == ((2, 8, 8, 3), np.uint8)
    assert data["arr_1"].tolist() == [0, 1]


@pytest.mark.parametrize(
  ("flags", "texts"),
  [
    (["--source="], ["--source = '': must be given"]),
    (["--labels=labels"], ["--labels = 'labels': needs --features"]),
    (["--noscaled"], ["--scaled = False: needs --features"]),
    (["--num_images=2"], ["--num_images = 2: needs --reference_batch"]),
    (["--features=set.npz"], ["--source = ", "must be left out with --features"]),
    (["--source=nowhere"], ["--source = 'nowhere': must be a folder"]),
    (
      ["--vae=./nowhere"],
      [
        "--vae = './nowhere': must be an existing folder",
        "config.json and diffusion_pytorch_model.safetensors of https://",
      ],
    ),
    (["--dtype=float8"], ["--dtype = 'float8': accepted are float16, bfloat16"]),
    (["--compute_dtype=half"], ["--compute_dtype = 'half'", "float32, bfloat16"]),
    (["--image_size=17"], ["--image_size = 17: must be divisible by 8"]),
    (["--max_unreadable=0"], ["--max_unreadable = 0: 1 files cannot be read", "cut"]),
    (["--process_index=1"], ["--process_count = None: must be given"]),
    (
      ["--process_index=2", "--process_count=2"],
      ["--process_index = 2: must lie in [0, 1]"],
    ),
  ],
)
def test_bad_encoding_flags_are_refused_in_one_line(
  photographs, tmp_path, flags, texts
):
  given = [f"--source={photographs}", f"--vae={VAE}", "--image_size=16", *flags]
  assert_refused(encode(tmp_path / "out", *given), *texts)


def test_folder_of_another_latent_set_is_refused_and_unchanged(photographs, encoded):
  before = sorted(encoded.iterdir())
  given = [f"--source={photographs}", f"--vae={VAE}", "--image_size=16"]
  result = encode(encoded, *given, "--dtype=bfloat16")
  assert_refused(result, str(encoded), "dtype = 'float16', not 'bfloat16'")
  assert sorted(encoded.iterdir()) == before


@pytest.mark.parametrize("flag", ["--verify", "--statistics"])
def test_folder_without_a_latent_set_cannot_be_inspected(tmp_path, flag):
  assert_refused(encode(tmp_path, flag), f"--output = {str(tmp_path)!r}: holds no card")


# In a bucket.


def test_run_in_a_bucket_is_sampled_and_scored(bucket, bucket_environment, tmp_path):
  run_folder = epath.Path(f"{bucket}/run")
  checkpoint = save_tiny(run_folder)
  flags = [checkpoint, "--num_images=20", "--num_steps=2", "--png"]
  code, out, err = run("mdt_jax.sample", *flags, environment=bucket_environment)
  assert code == 0, err
  assert f"{run_folder}/samples/samples.npz" in out
  names = {path.name for path in (run_folder / "samples").iterdir()}
  assert names == {"samples.npz", "samples.png", "samples.json", "png"}
  assert len(list((run_folder / "samples" / "png").iterdir())) == 20

  flags = [f"--samples={run_folder}/samples/samples.npz", "--metrics=frechet"]
  flags += [f"--save_statistics={bucket}/digits.npz"]
  evaluate = ("mdt_jax.evaluate", checkpoint, *flags)
  code, _, err = run(*evaluate, environment=bucket_environment)
  assert code == 0, err
  found = json.loads((run_folder / "evaluation" / "scores.json").read_text())
  assert found["images"] == 20
  assert found["samples"] == f"{run_folder}/samples/samples.npz"
  flags = [*flags[:2], f"--reference={bucket}/digits.npz"]
  code, _, err = run("mdt_jax.evaluate", *flags, environment=bucket_environment)
  assert code == 0, err
  again = json.loads((run_folder / "samples" / "scores.json").read_text())
  assert again["scores"] == found["scores"]

  # Local images of the local copy of the run are the same.
  save_tiny(tmp_path / "run")
  flags = ["--num_images=20", "--num_steps=2", f"--output={tmp_path / 'samples'}"]
  code, _, err = run("mdt_jax.sample", f"--checkpoint={tmp_path / 'run'}", *flags)
  assert code == 0, err
  local = (tmp_path / "samples" / "samples.npz").read_bytes()
  assert (run_folder / "samples" / "samples.npz").read_bytes() == local


def test_run_in_a_bucket_is_converted_and_back(bucket, bucket_environment, tmp_path):
  save_tiny(f"{bucket}/run")
  for flags in (
    ["--to_torch", f"--input={bucket}/run", f"--output={bucket}/x.safetensors"],
    [f"--input={bucket}/x.safetensors", f"--output={bucket}/back"],
    ["--to_torch", f"--input={bucket}/back", f"--output={tmp_path / 'y.safetensors'}"],
  ):
    code, _, err = run("mdt_jax.convert", *flags, environment=bucket_environment)
    assert code == 0, err
  content = epath.Path(f"{bucket}/x.safetensors").read_bytes()
  (tmp_path / "x.safetensors").write_bytes(content)
  tensors, back = (read_tensors(tmp_path / f"{name}.safetensors") for name in "xy")
  assert tensors.keys() == back.keys()
  assert all(tensors[name].tobytes() == back[name].tobytes() for name in tensors)


@pytest.mark.parametrize(
  ("command", "flags", "texts"),
  [
    ("sample", "--checkpoint=gs://missing/run", ["--checkpoint = ", "no bucket"]),
    ("sample", "--checkpoint={}/none", ["--checkpoint = ", "'checkpoints' in it"]),
    ("sample", "--checkpoint={}/run/checkpoints/0", ["--checkpoint={}/run --step=0?"]),
    ("sample", "--checkpoint={}/run --output=gs://missing/x", ["--output = "]),
    ("sample", "--checkpoint=hf://org/name", ["--output = None: must be given"]),
    ("sample", "--checkpoint=s3://x/run", ["--checkpoint = 's3://x/run'", "local"]),
    ("sample", "--checkpoint={}/run --vae={}/vae", ["--vae = '{}/vae'", "local"]),
    ("main", "--config={}/c.py --workdir={}/w", ["--config = '{}/c.py'", "local"]),
    ("evaluate", "--checkpoint=hf://org/name", ["--output = None: must be given"]),
    ("evaluate", "--samples={}/none.npz", ["--samples = '{}/none.npz'", "a file"]),
    ("evaluate", "--samples={}/run", ["--samples = '{}/run'", "copy them"]),
    ("convert", "--input={}/none.pt --output={}/new", ["--input = '{}/none.pt'"]),
    ("convert", "--input={}/run --output={}/new", ["--input = '{}/run'", "--to_torch"]),
    ("convert", "--input={}/run --output={}/a.npz --to_torch", ["--output = ", ".pth"]),
    ("convert", "--input=hf://a/b --output={}/new", ["--input = 'hf://a/b'"]),
  ],
)
def test_bad_path_of_a_bucket_is_refused_in_one_line(
  bucket, bucket_environment, command, flags, texts
):
  epath.Path(f"{bucket}/run/checkpoints/0/ema/x").write_bytes(b"")
  epath.Path(f"{bucket}/run/checkpoints/0/checksums.json").write_bytes(b"")
  before = list_objects(epath.Path(bucket))
  given = [flag.replace("{}", bucket) for flag in flags.split()]
  result = run(f"mdt_jax.{command}", *given, environment=bucket_environment)
  assert_refused(result, *(text.replace("{}", bucket) for text in texts))
  assert list_objects(epath.Path(bucket)) == before
