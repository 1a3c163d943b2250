"""Command lines that a hurried, mistaken or hostile user types, drawn from a seed."""

from __future__ import annotations

import random
import string
from pathlib import Path

# Command -> lines of flags that work in the folder {W} of `world.make_world`.
LINES = {
  "main": [
    "--config={W}/config.py --workdir={W}/new",
    "--config=digits --workdir={W}/new --config.num_steps=1 --config.batch_size=4 "
    "--config.model.depth=2 --config.model.hidden_size=16 --config.model.num_heads=2 "
    "--config.model.name=DiT-S/2 --config.sample_every=0 --config.eval.every=0 "
    "--config.optimizer.warmup_steps=0",
    "--config={W}/config.py --workdir={W}/new --config.data.source=images "
    "--config.data.path={W}/photos --config.model.in_channels=3",
    "--config={W}/config.py --workdir={W}/new --replay_step=0",
  ],
  "sample": [
    "--checkpoint={W}/run --output={W}/out --num_images=2 --num_steps=2",
    "--checkpoint={W}/run --output={W}/out --labels=1,2 --method=ddim --num_steps=2 "
    "--eta=0.5 --cfg_scale=2 --cfg_interval=0.1,0.9 --png",
    "--checkpoint={W}/run --output={W}/out --labels=1 --inpaint={W}/image.png "
    "--mask={W}/mask.png --num_steps=2",
    "--checkpoint={W}/run --output={W}/out --labels=1 --edit={W}/image.png "
    "--strength=0.5 --num_steps=2",
  ],
  "evaluate": [
    "--samples={W}/samples.npz --reference={W}/samples.npz --output={W}/out "
    "--metrics=frechet",
    "--checkpoint={W}/run --metrics=bpd --num_images=2 --num_steps=2 --output={W}/out",
    "--checkpoint={W}/run --samples={W}/samples.npz --output={W}/out "
    "--metrics=accuracy,diversity --save_statistics={W}/statistics.npz",
  ],
  "encode": [
    "--source={W}/photos --vae={W}/vae --output={W}/out --image_size=16",
    "--source={W}/photos --vae={W}/vae --output={W}/out --image_size=16 "
    "--condition=vector={W}/vectors.npz --captions={W}/captions.json",
    "--statistics --output={W}/latents",
    "--verify --output={W}/latents",
    "--reference_batch={W}/reference.npz --source={W}/photos --image_size=16",
  ],
  "convert": [
    "--to_torch --input={W}/run --output={W}/out.safetensors",
    "--input={W}/weights.pt --output={W}/out --num_heads=2",
    "--inception --input={W}/weights.pt --output={W}/out.safetensors",
    "--to_hub --input={W}/run --output={W}/out",
  ],
  "plan": [
    "--config={W}/config.py --topology=cpu:2 --json={W}/plan.json",
    "--config={W}/config.py --topology=cpu:1 --what=sample --chip=v5e",
  ],
}
HOSTILE_TEXTS = [
  *("", " ", "none", "None", "nan", "-1", "0", "1e12", "inf", "-inf", "0x10", "1,2,3"),
  *("true", "[]", "{}", "{'a': 1}", "()", "a,b", ",", ",,", "=", "--", "%s", "${HOME}"),
  *("é", "日本", "\u202e", "a\nb", "\\", "'", '"', "a b", "*", "~nosuchuser/x", "\x07"),
  *("9" * 400, "x" * 5000, "@file", "0.5,", "1/0", "__import__('os')", "1_000", "+5"),
]
HOSTILE_PATHS = [
  *("gs:///run", "s3://b/x", "file:///etc/passwd", "https://example.org/x.npz"),
  *("{W}", "{W}/nowhere", "{W}/photos", "{W}/samples.npz", "{W}/image.png"),
  *("{W}/config.py/below", "/dev/null/x", "/dev/null", "/proc/self/x"),
  *(
    "{W}/run/checkpoints",
    "{W}/run/checkpoints/0",
    "{W}/" + "y" * 300,
    "~nosuchuser/x",
  ),
  *("{W}/latents", "{W}/vae", "{W}/weights.pt", "{W}/../nowhere/x", "~nosuchuser/x"),
  *("", ".", "-"),
]
HOSTILE_INTEGERS = [
  *("-1", "0", "-5", "1000000000000", "9" * 30, "-" + "9" * 30, "99999", "3"),
  *("2147483647", "2147483648", "4294967296", "9223372036854775807", str(2**64)),
]
HOSTILE_FLOATS = [
  *("nan", "inf", "-inf", "1e-300", "1e308", "1e400", "0.0", "-0.5", "1.5", "3.0"),
  *("1e12", "-1e12", "5e-324", "0.999999999999"),
]
NO_NUMBERS = ["1e3", "1.5.2", "0x10", "1_0", "5%", "\uff11", "", "1,2", "abc", "1-"]
# Numbers that are accepted and take their time: a run of 10**12 steps is a valid run.
ENDLESS = ("num_steps", "steps", "replay_step", "repeats", "join_timeout")
UNKNOWN = [
  "--ckpt={W}/run",
  "--lr=1",
  "--batchsize=3",
  "--confg=digits",
  "---x",
  "-x=1",
]
SPELLINGS = ["-", "_", "s", "X", "."]


def command_lines(world: Path, seed: int, count: int) -> list[tuple[str, list[str]]]:
  """Draws command lines.

  Args:
    world: folder of `world.make_world`.
    seed: seed of all draws.
    count: number of lines.

  Returns:
    (name of the command, arguments) of each line: a line that works, with one to three
    changes.
  """
  rng = random.Random(seed)
  found = []
  for _ in range(count):
    command = rng.choice(list(LINES))
    arguments = rng.choice(LINES[command]).split()
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
      arguments = rng.choice(CHANGES)(arguments, command, rng)
    found.append((command, [text.replace("{W}", str(world)) for text in arguments]))
  return found


def _replace_value(arguments: list[str], command: str, rng: random.Random):
  """Gives a flag of the line a hostile value."""
  place = rng.randrange(len(arguments)) if arguments else 0
  if not arguments:
    return arguments
  name, _, value = arguments[place].partition("=")
  changed = [*arguments]
  changed[place] = f"{name}={_hostile_value(name, value, rng)}"
  return changed


def _hostile_value(name: str, value: str, rng: random.Random) -> str:
  """A value of the kind of `value`, most often, or any text."""
  if rng.random() < 0.15:
    pool = HOSTILE_TEXTS
  elif "/" in value:
    pool = HOSTILE_PATHS
  elif value[:1].isdigit() and rng.random() < 0.15:
    pool = NO_NUMBERS
  elif value.isdigit():
    pool = HOSTILE_INTEGERS
  elif value[:1].isdigit():
    pool = HOSTILE_FLOATS
  else:
    pool = HOSTILE_TEXTS
  text = rng.choice(pool)
  is_endless = name.rpartition(".")[2].lstrip("-") in ENDLESS
  return "-1" if is_endless and text.strip("+").replace("_", "").isdigit() else text


def _add_flag(arguments: list[str], command: str, rng: random.Random):
  """Adds a flag of another line of the command, with a hostile value."""
  others = " ".join(LINES[command]).split()
  name, _, value = rng.choice([*others, *MORE[command]]).partition("=")
  return [*arguments, f"{name}={_hostile_value(name, value, rng)}"]


def _drop_flag(arguments: list[str], command: str, rng: random.Random):
  place = rng.randrange(len(arguments) + 1)
  return arguments[:place] + arguments[place + 1 :]


def _misspell(arguments: list[str], command: str, rng: random.Random):
  """Adds, drops or swaps a letter of a flag's name."""
  if not arguments:
    return arguments
  place = rng.randrange(len(arguments))
  name, equals, value = arguments[place].partition("=")
  at = rng.randrange(2, len(name) + 1) if len(name) > 2 else 0
  letter = rng.choice([*SPELLINGS, rng.choice(string.ascii_lowercase)])
  name = rng.choice([name[:at] + letter + name[at:], name[:at] + name[at + 1 :]])
  return [*arguments[:place], name + equals + value, *arguments[place + 1 :]]


def _drop_value(arguments: list[str], command: str, rng: random.Random):
  if not arguments:
    return arguments
  place = rng.randrange(len(arguments))
  name = arguments[place].partition("=")[0]
  return [*arguments[:place], name, *arguments[place + 1 :]]


def _negate(arguments: list[str], command: str, rng: random.Random):
  if not arguments:
    return arguments
  place = rng.randrange(len(arguments))
  name = arguments[place].replace("--", "--no", 1)
  return [*arguments[:place], name, *arguments[place + 1 :]]


def _add_unknown(arguments: list[str], command: str, rng: random.Random):
  place = rng.randrange(len(arguments) + 1)
  words = rng.choice([UNKNOWN, HOSTILE_TEXTS, HOSTILE_PATHS])
  return [*arguments[:place], rng.choice(words), *arguments[place:]]


def _repeat(arguments: list[str], command: str, rng: random.Random):
  return [*arguments, rng.choice(arguments)] if arguments else arguments


def _shuffle(arguments: list[str], command: str, rng: random.Random):
  return rng.sample(arguments, len(arguments))


CHANGES = [
  *[_replace_value] * 6,
  *[_add_flag] * 6,
  *(_drop_flag, _misspell, _drop_value, _negate, _add_unknown, _repeat, _shuffle),
]
# Further flags of each command, with values of their kind.
MORE = {
  "main": [
    *("--config.batch_size=8", "--config.seed=1", "--config.log_every=1"),
    *("--config.model.hidden_size=16", "--config.model.depth=2", "--config.model=x"),
    *("--config.model.patch_size=2", "--config.model.input_size=8", "--flagfile=/x"),
    *("--config.model.num_classes=10", "--config.model.num_heads=2"),
    *("--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"),
    *("--config.data.path={W}/photos", "--config.data.num_workers=1"),
    *("--config.data.source=latents", "--config.data.vae={W}/vae"),
    *("--config.data.num_threads=1", "--config.data.validation=0.5"),
    *("--config.optimizer.learning_rate=0.1", "--config.optimizer.arguments={}"),
    *("--config.ema_decays=0.9,0.99", "--config.masking.ratio=0.3,0.5"),
    *("--config.diffusion.num_timesteps=10", "--config.checkpoint_every=1"),
    *("--config.checkpoints_to_keep=2", "--config.grace_seconds=1"),
    *("--config.sample_every=1", "--config.num_samples=1", "--config.eval.every=1"),
    *("--config.eval.reference={W}/samples.npz", "--config.eval.num_images=4"),
    *("--config.eval.metrics=frechet", "--config.sampling.method=ddim"),
    *("--config.sampling.cfg_interval=0,1", "--coordinator_address=localhost:1"),
    *("--num_processes=1", "--process_id=0", "--replay_step=0", "--workdir={W}/run"),
  ],
  "sample": [
    *("--step=0", "--ema_decay=0.9", "--seed=1", "--batch_size=2", "--labels=cat"),
    *("--cfg_power=1", "--cfg_channels=1", "--spacing=karras", "--vae={W}/vae"),
    *("--interpolation=0.5", "--repeats=2", "--strength=0.5", "--png", "--overwrite"),
    *("--mask={W}/mask.png", "--inpaint={W}/image.png", "--edit={W}/image.png"),
  ],
  "evaluate": [
    *("--inception={W}/weights.pt", "--step=0", "--ema_decay=0.9", "--seed=1"),
    *("--sampling=num_steps=2", "--sampling=cfg_interval=0.2,0.8", "--batch_size=2"),
    *("--data_source=images", "--data_path={W}/photos", "--vae={W}/vae"),
    *("--metrics=fid,is", "--num_images=3", "--save_statistics={W}/s.npz"),
  ],
  "encode": [
    *("--dtype=float16", "--compute_dtype=float32", "--num_shards=2", "--batch_size=2"),
    *("--num_threads=2", "--max_unreadable=1", "--process_index=0", "--split=train"),
    *("--process_count=1", "--num_images=2", "--image_size=16", "--source=tfds:mnist"),
    *("--condition={W}/vectors.npz", "--condition_missing=leave_out"),
  ],
  "convert": [
    *("--network=DiT", "--decode_depth=2", "--num_heads=2", "--step=0"),
    *("--ema_decay=0.9", "--overwrite", "--to_torch", "--inception"),
    *("--to_hub", "--license=mit", "--private"),
  ],
  "plan": [
    *("--topology=v5e:2x2", "--batch_per_device=2", "--find_batch", "--chip=v4"),
    *("--what=train", "--config.batch_size=2", "--json={W}/p.json"),
  ],
}
