"""Objectives on a part of the tokens: schedules of the share, the unmasked phase."""

from __future__ import annotations

import json
import logging

import jax
import numpy as np
import pytest

from mdt_jax import SettingError, create_model, create_objective, create_process
from mdt_jax.diffusion import PROCESSES, Flow
from mdt_jax.experiment import build
from mdt_jax.models import TREAD as Routed
from mdt_jax.models import flops
from mdt_jax.objectives import UnmaskedPhase
from mdt_jax.objectives.tokens import SCHEDULES, scheduled_ratio
from mdt_jax.objectives.unmasked_phase import UNMASKED
from mdt_jax.training import loop
from tests import reference
from tests.training.test_loop import assert_same
from tests.training.test_step import make_batch
from tests.training.tiny import tiny_config

TINY = dict(input_size=8, in_channels=1, num_classes=10, hidden_size=16, num_heads=2)
TREAD = {"model.name": "TREAD-S/2", "model.depth": 6, "diffusion.process": "flow"}
TREAD |= {"sampling.method": "heun"}


def make_objective(**settings):
  model = create_model("TREAD-S/2", **TINY, depth=6)
  process = create_process("flow")
  return create_objective("tread", model=model, process=process, **settings)


# Schedules.


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_ends_at_its_shares(name):
  ends = [scheduled_ratio(name, progress, 0.75, 0.25) for progress in (0.0, 1.0)]
  expected = {"constant": [0.75, 0.75], "linear": [0.25, 0.75]}.get(name, [0.75, 0.25])
  np.testing.assert_allclose(ends, expected, atol=1e-3)


def test_schedule_keeps_more_tokens_step_by_step():
  """Of 16 tokens: from 4 kept to 16."""
  objective = make_objective(ratio=0.75, schedule="cosine2", num_steps=100)
  kept = [objective.choose_static(0, step) for step in range(120)]
  assert kept == sorted(kept)
  assert (kept[0], kept[50], kept[100], kept[119]) == (4, 10, 16, 16)
  assert set(kept) == set(objective.static_choices)
  assert objective.static_choices == (4, 6, 8, 10, 11, 13, 15, 16)


def test_number_of_lengths_limits_the_programs():
  arguments = {"ratio": 0.75, "schedule": "linear", "num_steps": 10}
  objective = make_objective(num_lengths=3, min_ratio=0.25, **arguments)
  assert objective.static_choices == (4, 8, 12)


def test_config_gives_the_schedule_the_steps_of_the_masked_phase():
  config = tiny_config(**TREAD, num_steps=8)
  config.objective.arguments = {"ratio": 0.75, "schedule": "cosine2"}
  whole = build(config).objective
  config.objective.unmasked_from = 4
  part = build(config).objective
  kept = [whole.choose_static(0, step) for step in range(0, 8, 2)]
  assert [part.choose_static(0, step) for step in range(4)] == kept
  assert part.choose_static(0, 4) == UNMASKED


def test_step_costs_three_forward_passes():
  objective = make_objective()
  assert objective.flops(8) == 3 * flops.forward_flops(objective.model, 8)


@pytest.mark.parametrize(
  ("settings", "name"),
  [
    ({"schedule": "cosine"}, "schedule"),
    ({"schedule": "cosine2"}, "num_steps"),
    ({"min_ratio": 0.6, "schedule": "linear", "num_steps": 9}, "min_ratio"),
    ({"min_ratio": 0.1}, "min_ratio"),
    ({"min_ratio": -0.1}, "min_ratio"),
    ({"min_ratio": "0"}, "min_ratio"),
    ({"num_lengths": 1}, "num_lengths"),
    ({"num_lengths": 2.5}, "num_lengths"),
    ({"width": 0.1}, "width"),
  ],
)
def test_schedule_that_cannot_be_is_refused(settings, name):
  with pytest.raises(SettingError) as error:
    make_objective(**settings)
  assert error.value.setting == name


# The unmasked phase.


def phase_of(name, network, start=2, **settings):
  model = create_model(network, **TINY, depth=6)
  process = create_process("gaussian", variance="fixed_large")
  if network.startswith("MDT"):
    model = model.clone(decode_depth=2, learn_sigma=False)
  objective = create_objective(name, model=model, process=process, **settings)
  return UnmaskedPhase(objective, start), objective


@pytest.mark.parametrize(
  ("name", "network"), [("tread", "TREAD-S/2"), ("mdt", "MDTv2-S/2")]
)
def test_phases_have_the_losses_of_both_objectives(name, network):
  """The last phase is that of one unmasked pass, with the same random draws."""
  phased, masked = phase_of(name, network)
  plain = create_objective("plain", model=phased.model, process=phased.process)
  params = reference.random_params(phased.model)
  apply = phased.model.apply
  batch = make_batch(tiny_config())
  draws = [o.draw(jax.random.key(0), batch) for o in (phased, masked, plain)]
  jax.tree.map(np.testing.assert_array_equal, *draws[:2])
  static = phased.choose_static(0, 1)
  assert static == masked.choose_static(0, 1)
  for step, other, choice in ((1, masked, static), (2, plain, None)):
    chosen = phased.choose_static(0, step)
    run = jax.jit(
      lambda p, s=chosen, o=other, c=choice: (
        phased.loss(apply, p, draws[0], s),
        o.loss(apply, p, draws[0], c),
      )
    )
    jax.tree.map(np.testing.assert_array_equal, *run(params))


def test_choices_are_sorted_by_cost():
  """Two passes of MDT cost more than one; TREAD costs less with a route."""
  tread, mdt = phase_of("tread", "TREAD-S/2"), phase_of("mdt", "MDT-S/2", num_lengths=1)
  assert tread[0].static_choices == [8, UNMASKED]
  assert mdt[0].static_choices == [UNMASKED, *mdt[1].static_choices]
  assert tread[0].flops(UNMASKED) == flops.train_flops(tread[0].model)
  assert tread[0].flops(8) == tread[1].flops(8)
  assert "from step 2" in tread[0].summary


@pytest.mark.parametrize(
  ("settings", "choices"),
  [
    ({"ratio": 0.0}, [UNMASKED]),
    ({"ratio": 0.5, "schedule": "cosine2", "num_lengths": 2}, [8, UNMASKED]),
  ],
)
def test_steps_on_all_tokens_share_a_program(settings, choices):
  phased, _ = phase_of("tread", "TREAD-S/2", start=5, num_steps=5, **settings)
  assert phased.static_choices == choices
  assert {phased.choose_static(0, step) for step in range(8)} == set(choices)


@pytest.mark.parametrize("network", [TREAD, {"model.name": "MDT-S/2"}])
def test_run_that_resumes_across_the_phase_is_bit_identical(tmp_path, caplog, network):
  """Steps 0 to 2 are masked, step 3 is not; the second run stops before the change."""
  settings = {**network, "objective.unmasked_from": 3, "log_every": 1}
  with caplog.at_level(logging.INFO, "mdt_jax"):
    whole = loop.train(tiny_config(**settings), tmp_path / "whole")
  assert [line for line in caplog.messages if "all tokens from step 3" in line]
  compiled = [line for line in caplog.messages if line.startswith("compiling ")]
  assert len(compiled) == 2
  with pytest.raises(StoppedError):
    loop.train(tiny_config(**settings), tmp_path / "parts", hooks=[stop_at_three])
  assert_same(whole, loop.train(tiny_config(**settings), tmp_path / "parts"))
  lines = [
    [json.loads(text)["loss"] for text in path.read_text().splitlines()]
    for path in (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
  ]
  assert lines[0] == lines[1]


def test_phases_with_other_losses_share_a_log_line(tmp_path):
  """The line of step 4 has the masked loss of step 2, and the loss of both steps."""
  settings = {"model.name": "MDT-S/2", "objective.unmasked_from": 3}
  loop.train(tiny_config(**settings), tmp_path)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert ["masked_loss" in json.loads(line) for line in lines] == [True, True]


class StoppedError(Exception):
  """Ends a run from a hook."""


def stop_at_three(done, state):
  del state
  if done == 3:
    raise StoppedError


def test_phase_that_begins_with_the_end_is_none():
  objective = build(tiny_config(**TREAD, **{"objective.unmasked_from": 4})).objective
  assert not isinstance(objective, UnmaskedPhase)


def test_network_without_a_count_of_flops_gets_a_phase():
  class Own(Routed):
    variant: str = "Own"

  model = Own(**TINY, depth=6)
  objective = create_objective("tread", model=model, process=create_process("flow"))
  assert UnmaskedPhase(objective, 2).static_choices == [8, UNMASKED]


@pytest.mark.parametrize("name", ["model", "process", "num_steps"])
def test_arguments_that_the_run_defines_are_refused(name):
  with pytest.raises(SettingError) as error:
    build(tiny_config(**TREAD, **{"objective.arguments": {name: 3}}))
  assert error.value.setting == f"config.objective.arguments.{name}"


def test_error_lists_the_arguments_that_a_config_can_set():
  with pytest.raises(SettingError) as error:
    build(tiny_config(**TREAD, **{"objective.arguments": {"share": 0.5}}))
  assert error.value.setting == "config.objective.arguments.share"
  listed = error.value.accepted.partition("accepted are ")[2].split(", ")
  assert listed == ["min_ratio", "num_lengths", "ratio", "schedule"]


class WholeLosses(Flow):
  """A process of the user's own, whose losses are means over all tokens."""

  def training_losses(self, model_output, x0, x_t, t, noise):
    return {"loss": ((model_output - noise) ** 2).mean((1, 2, 3))}


@pytest.mark.parametrize("network", ["MaskDiT", "MicroDiT"])
def test_process_whose_losses_take_no_mean_is_refused(monkeypatch, network):
  monkeypatch.setitem(PROCESSES, "whole", WholeLosses)
  settings = {"model.name": f"{network}-S/2", "diffusion.process": "whole"}
  with pytest.raises(SettingError, match="must accept the argument mean") as error:
    build(tiny_config(**settings, **{"sampling.method": "heun"}))
  found = error.value.setting, error.value.value
  assert found == ("config.diffusion.process", "WholeLosses")


@pytest.mark.parametrize("start", [-1, 5])
def test_phase_beyond_the_run_is_refused(start):
  with pytest.raises(SettingError) as error:
    build(tiny_config(**TREAD, **{"objective.unmasked_from": start}))
  assert error.value.setting == "config.objective.unmasked_from"
  assert "must lie in [0, config.num_steps = 4]" in error.value.accepted


def test_phase_without_masked_tokens_is_refused():
  settings = {"objective.name": "plain", "objective.unmasked_from": 2}
  with pytest.raises(SettingError, match="removes no tokens") as error:
    build(tiny_config(**settings))
  assert error.value.setting == "config.objective.unmasked_from"


def test_own_objective_gets_a_phase():
  config = tiny_config(**TREAD, **{"objective.unmasked_from": 2})
  objective = build(config, objective=make_objective()).objective
  assert [objective.choose_static(0, step) for step in range(3)] == [8, 8, UNMASKED]
