"""largest_batch, plan_run, and out-of-memory errors of the compiler."""

import jax
import pytest

from mdt_jax.chips import parse_topology
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.planning import plan
from mdt_jax.planning.plan import DoesNotFitError, largest_batch, plan_run
from mdt_jax.settings import Settings
from mdt_jax.training.program import make_program
from tests.training.tiny import tiny_config

GIB = 2**30
LIMITS = [1, 2, 5, 16, 17, 100]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("start", [1, 16])
def test_largest_batch_is_found_within_one_eighth(limit, start):
  tried = []

  def plan_with(batch):
    tried.append(batch)
    if batch > limit:
      raise DoesNotFitError(2, 1)
    return f"plan of {batch}"

  batch, found = largest_batch(plan_with, start)
  assert found == f"plan of {batch}"
  assert limit - max(1, limit // 8) <= batch <= limit
  assert len(tried) == len(set(tried)) <= 12


def test_largest_batch_is_none_when_nothing_fits():
  def plan_with(batch):
    raise DoesNotFitError(2, 1)

  assert largest_batch(plan_with) is None


def test_a_search_without_a_memory_limit_is_refused():
  settings = Settings.from_config(tiny_config())
  with pytest.raises(SettingError, match=r"--find_batch = True.*--chip"):
    plan_run(settings, parse_topology("cpu:2"), find_batch=True)


def plan_groups(monkeypatch, largest, **arguments):
  """Plans a run of 3 groups whose program fits `largest` images on each device."""

  def make_plan(settings, topology, devices, *rest):
    if settings.batch_size % (3 * len(devices)):
      raise SettingError("config.batch_size", settings.batch_size, "must be divisible")
    if settings.batch_size > largest * len(devices):
      raise DoesNotFitError(2, 1)
    return settings.batch_size

  monkeypatch.setattr(plan, "open_devices", lambda topology: [None] * 4)
  monkeypatch.setattr(plan, "make_plan", make_plan)
  settings = Settings.from_config(tiny_config(**{"masking.groups": 3}))
  return plan_run(settings, parse_topology("v5e:2x2"), **arguments)


@pytest.mark.parametrize(("largest", "found"), [(3, 3), (5, 3), (12, 12), (40, 39)])
def test_search_tries_only_batches_that_the_groups_divide(monkeypatch, largest, found):
  assert plan_groups(monkeypatch, largest, find_batch=True) == 4 * found


def test_search_needs_an_image_for_each_group(monkeypatch):
  with pytest.raises(SettingError, match="3 images on each device do not fit"):
    plan_groups(monkeypatch, 2, find_batch=True)


def test_batch_per_device_is_named_as_typed(monkeypatch):
  message = r"^--batch_per_device = 4: gives config.batch_size = 16: must be divisible"
  with pytest.raises(SettingError, match=message):
    plan_groups(monkeypatch, 9, batch_per_device=4)


@pytest.fixture(scope="module")
def program():
  return make_program(build(tiny_config()))


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    ("Used 16.00G of 15.75G hbm. Exceeded hbm capacity by 256M.", 16 * GIB),
    (
      "the total memory required for HLO temporaries (31.00G) exceeds available HBM "
      "(15.75G).",
      31 * GIB,
    ),
  ],
)
def test_out_of_memory_error_of_the_compiler_is_parsed(program, message, needed):
  error = plan._does_not_fit(RuntimeError(message), program)
  assert error.limit == 15.75 * GIB
  assert error.needed == pytest.approx(needed, rel=1e-3)
  assert str(error).endswith("GiB too much")


def test_other_compiler_errors_are_not_out_of_memory(program):
  assert plan._does_not_fit(RuntimeError("UNIMPLEMENTED: sort"), program) is None


def test_program_that_jax_cannot_read_gives_a_warning(caplog):
  class Compiled:
    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nat a line")

  assert plan._read(Compiled()) is None
  assert "cannot read the program" in caplog.text
  assert "RET_CHECK failure)" in caplog.text and "at a line" not in caplog.text
