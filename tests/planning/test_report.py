"""The text of a plan."""

import pytest

from mdt_jax.planning.kernels import Kernels
from mdt_jax.planning.plan import Plan
from mdt_jax.planning.report import NUM_KERNELS, describe

GIB = 2**30


def make_plan(**changed):
  """A plan of 8 images on four chips."""
  attributes = {
    "what": "train",
    "topology": "v5e:2x2",
    "slices": 1,
    "mesh": {"data": 4, "fsdp": 1, "tensor": 1},
    "batch_size": 8,
    "dtype": "bfloat16",
    "memory": {"parameters": GIB, "total": 3 * GIB},
    "limit": 16.0 * GIB,
    "flops": 2e12,
    "collectives": {},
    "kernels": {"fusion": Kernels(2, 10**9, 4 * 10**9, 0.25)},
    "compile_seconds": 7.0,
    "seconds": {"products": 0.1, "memory": 0.2, "network": 0.0},
  }
  return Plan(**(attributes | changed))


def test_text_says_what_fits_and_how_fast():
  text = describe(make_plan())
  assert "data 4 x fsdp 1 x tensor 1" in text
  assert "fits: 13.00 of 16.00 GiB remain free" in text
  assert "so at most 40 images/s and 50% of the peak FLOPs" in text
  assert "250.0 ms, so 32 images/s and 40% of the peak FLOPs" in text


def test_devices_without_a_known_memory_have_no_verdict():
  text = describe(make_plan(topology="cpu:4", limit=None, seconds={}))
  assert "whether it fits is unknown" in text and "--chip" in text
  assert "GiB remain free" not in text and "least time" not in text


def test_program_that_jax_cannot_read_has_bounds_but_no_kernels():
  seconds = {"products": 0.1, "memory": 0.2}
  text = describe(make_plan(kernels=None, collectives=None, seconds=seconds))
  assert "so at most 40 images/s" in text
  assert "kernels" not in text and "devices send" not in text


@pytest.mark.parametrize("left", [0, 1, 3])
def test_table_sums_the_kernels_that_it_does_not_name(left):
  kernels = {
    f"kind_{i}": Kernels(1, 10**9, 10**9, 0.001) for i in range(NUM_KERNELS + left)
  }
  text = describe(make_plan(kernels=kernels))
  table = [line.split() for line in text.partition("\nkernels  ")[2].splitlines()[1:]]
  assert table[-1][:2] == ["all", "kernels"]
  assert float(table[-1][3]) == NUM_KERNELS + left
  assert len(table) == NUM_KERNELS + 1 + (left > 0)
  if left:
    assert table[-2][:3] == [str(left), "other", "kinds"]
    assert float(table[-2][4]) == left
