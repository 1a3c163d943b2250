"""Invalid arguments: the error suggests the intended flag."""

from __future__ import annotations

import re
import shlex

import pytest
from absl import flags
from ml_collections import config_flags

from mdt_jax.cli.arguments import Arguments, UsageError
from mdt_jax.errors import SettingError


def arguments_of(*, has_config=True):
  """Returns the checks of a small command."""
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "Folder of the run. More.", values)
  flags.DEFINE_integer("num_images", None, "Number of images.", flag_values=values)
  flags.DEFINE_float("eta", None, "Noise.", flag_values=values)
  flags.DEFINE_bool("png", False, "Write files.", flag_values=values)
  flags.DEFINE_alias("count", "num_images", flag_values=values)
  if has_config:
    config_flags.DEFINE_config_file("config", None, "Config.", flag_values=values)
  return Arguments(
    "mdt_jax.small",
    list(values),
    {"config": "digits", "workdir": "runs/x"} if has_config else {},
    {"count": "num_images"},
    {"cfg_scale": "--sampling=cfg_scale"},
    values,
  )


def check(text, **kwargs):
  return arguments_of(**kwargs).check(shlex.split(text))


RUN = "--config=digits --workdir=x "


def refusal(text, **kwargs):
  with pytest.raises((UsageError, SettingError)) as error:
    check(text, **kwargs)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(
  ("typed", "meant"),
  [
    ("--batch_size=64", "--config.batch_size=64?"),
    ("--batch_size 64", "--config.batch_size?"),
    ("--batch-size=64", "--config.batch_size=64?"),
    ("--learning_rate=0.1", "--config.optimizer.learning_rate=0.1?"),
    ("--lr=0.1", "--config.optimizer.learning_rate=0.1?"),
    ("--data.path=a", "--config.data.path=a?"),
    ("--num_step=5", "--config.num_steps=5 or --config.sampling.num_steps=5?"),
    ("--num_image=5", "--num_images=5 or --config.eval.num_images=5?"),
    ("--ckpt=a", "--workdir=a?"),
    ("--wkdr='a b'", "--workdir='a b'?"),
    ("--cfg_scale=2", "--sampling=cfg_scale=2?"),
    ("--nothing_like_it=2", "python -m mdt_jax.small --help"),
    ("--config.model.hiden_size=5", "--config.model.hidden_size=5?"),
    ("--config.modle.hidden_size=5", "--config.model.hidden_size=5?"),
    ("--config.hidden_size=5", "--config.model.hidden_size=5?"),
    ("--config.sampling.steps=5", "--config.sampling.num_steps=5?"),
    ("--config.optimizer=lion", "--config.optimizer.name=lion?"),
    ("--config.mesh=8", "--config.mesh.data, --config.mesh.fsdp"),
    ("--config.modle", "no such setting; did you mean --config.model.name?"),
    ("--noconfig.model.dpth", "--noconfig.model.dpth: no such setting; did you mean"),
    ("--noflip", "--noconfig.data.flip?"),
    ("--nodata.flip", "--noconfig.data.flip?"),
    ("--noflip=true", "--config.data.flip=true?"),
    ("--nopngs", "--nopng?"),
    ("--ema=0.9", "--config.ema_decays=0.9?"),
    ("--epochs=5", "--config.num_steps=5 or --config.sampling.num_steps=5?"),
    ("--image_size=32", "--config.model.input_size=32?"),
    ("--guidance_scale=2", "--sampling=cfg_scale=2?"),
    ("---eta=2", "--eta=2?"),
    ("--noconfig.data.flip=true", "takes no value: write --config.data.flip=true"),
    ("--nopng=true", "takes no value: write --png=true"),
    ("batch_size=3", "--config.batch_size=3?"),
    ("--png true", "--png=true?"),
    ("--=5", "flags have the form"),
    ("-=5", "flags have the form"),
    ("-", "flags have the form"),
    ("--no", "python -m mdt_jax.small --help"),
    ("undefok", "flags have the form"),
    ("-- x", "flags have the form"),
  ],
)
def test_error_for_an_unknown_flag_suggests_a_flag(typed, meant):
  message = refusal(RUN + typed)
  assert meant in message
  assert shlex.split(typed)[0].partition("=")[0].strip("-") in message
  _, _, hints = message.rstrip("?").partition("did you mean ")
  for hint in filter(None, re.split(", | or ", hints)):
    if not hint.startswith("--sampling"):  # a flag of another command
      check(RUN + hint if "=" in hint or hint.startswith("--no") else f"{RUN}{hint}=1")


@pytest.mark.parametrize(
  ("typed", "accepted"),
  [
    ("--config.batch_size=abc", "whole number"),
    ("--config.num_steps=4e5", "whole number, such as 400000"),
    ("--config.data.flip=maybe", "true or false"),
    ("--config.sampling.eta=two", "a number"),
    ("--config.ema_decays=high", "numbers with commas"),
    ("--config.optimizer.arguments=x", "a dict"),
    ("--config.model.depth=none", "a config file can set None"),
    ("--config.model.input_size=16x24", "or HEIGHT,WIDTH such as 256,384"),
    ("--config.model.input_size=16,24,3", "or HEIGHT,WIDTH such as 256,384"),
    ("--config.model.input_size=16.5,24", "or HEIGHT,WIDTH such as 256,384"),
    ("--config.model.input_size=none", "or HEIGHT,WIDTH such as 256,384"),
    ("--eta=two", "a number"),
    ("--num_images=5.5", "whole number"),
    ("--png=maybe", "true or false"),
  ],
)
def test_error_for_a_wrong_type_names_flag_and_value(typed, accepted):
  flag, _, value = typed.partition("=")
  message = refusal(RUN + typed)
  assert message.startswith(f"{flag} = {value!r}: ")
  assert accepted in message


@pytest.mark.parametrize(
  ("typed", "meant"),
  [
    ("configs/digits.py", "--config=configs/digits.py?"),
    ("digits --workdir=x", "--config=digits?"),
    ("--config=digits runs/a", "--workdir=runs/a?"),
    (RUN + "--png yes", "flags have the form --name=value"),
  ],
)
def test_error_for_a_positional_argument_suggests_its_flag(typed, meant):
  assert meant in refusal(typed)


def test_error_for_a_missing_flag_gives_description_and_example():
  for typed in ("--config=digits", "--config=digits --workdir="):
    message = refusal(typed)
    assert "--workdir=runs/x" in message
    assert "Folder of the run" in message
  assert "--config=digits" in refusal("--workdir=x")


def test_flag_and_its_alias_are_refused_together():
  message = refusal(RUN + "--count=3 --num_images=3")
  assert "--count" in message and "--num_images" in message
  assert check(RUN + "--count=3 --count=4")[-1] == "--count=4"


def test_flag_without_a_value_is_refused():
  assert "--eta needs a value" in refusal(RUN + "--eta --png")
  assert "--eta needs a value" in refusal(RUN + "--eta")


def test_config_setting_is_refused_by_a_command_without_config():
  message = refusal("--config.sampling.eta=1", has_config=False)
  assert "mdt_jax.small reads no config" in message
  assert "--eta=1?" in message
  assert "reads no config" in refusal("--noconfig.data.flip", has_config=False)


def test_valid_arguments_are_returned():
  typed = "--num_images 3 --png --nopng -eta=1 --config.seed -1 --noconfig.data.flip"
  expected = ["--num_images=3", "--png", "--nopng", "--eta=1", "--config.seed=-1"]
  assert check(RUN + typed)[1:] == ["--workdir=x", *expected, "--noconfig.data.flip"]


def test_arguments_can_be_checked_twice():
  checks = arguments_of()
  for _ in range(2):
    checks.check(["--config=digits", "--workdir=x", "--count=3"])
  with pytest.raises(UsageError, match="--workdir must be given"):
    checks.check(["--config=digits", "--num_images=3"])
