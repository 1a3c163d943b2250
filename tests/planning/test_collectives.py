"""Calls and bytes of collectives, from the text of an HLO module."""

import pytest

from mdt_jax.planning.collectives import collectives

# A loop with 5 iterations and an all-gather, as XLA prints it for CPUs and GPUs. The
# entry computation has the other collectives, with every form of replica groups.
LOOP = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cond (p: (s32[], f32[2,3])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %p = (s32[], f32[2,3]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %five), direction=LT
}

%inside (q: f32[2,3]) -> f32[4,3] {
  %q = f32[2,3]{1,0} parameter(0)
  ROOT %g = bf16[4,3]{1,0} all-gather(%q), channel_id=1, replica_groups={{0,1},{2,3}}
}

%body (p.1: (s32[], f32[2,3])) -> (s32[], f32[2,3]) {
  %p.1 = (s32[], f32[2,3]{1,0}) parameter(0)
  %x = f32[2,3]{1,0} get-tuple-element(%p.1), index=1
  %start = bf16[4,3]{1,0} fusion(%x), kind=kCustom, calls=%inside
  ROOT %t = (s32[], f32[2,3]{1,0}) tuple(%x)
}

ENTRY %main (w: f32[8]) -> f32[8] {
  %w = f32[8]{0} parameter(0)
  %r = (f32[8]{0}, f32[2]{0}) all-reduce(%w, %w), channel_id=2, REDUCE, to_apply=%add
  %s = f32[2]{0} reduce-scatter(%w), channel_id=3, replica_groups=[2,4]<=[8]
  %c = f32[8]{0} collective-permute(%w), channel_id=4, source_target_pairs={{0,1}}
  %gs = (f32[4], f32[8]) all-gather-start(%w), channel_id=5, replica_groups={{0,1}}
  %gd = f32[8]{0} all-gather-done(%gs)
  ROOT %loop = (s32[], f32[2,3]{1,0}) while(%c), condition=%cond, body=%bodyTRIPS
}
"""


def module(trips="", reduce="replica_groups=mesh['a'=2,'b'=4] {'b'}"):
  return LOOP.replace("TRIPS", trips).replace("REDUCE", reduce)


def test_collective_in_a_loop_counts_once_per_iteration():
  found = collectives(module(), 8)["all-gather"]
  # Each iteration sends half of 4 x 3 bfloat16. The first call sends half of 8 float32.
  assert (found.calls, found.sent) == (5 + 1, 5 * 12 + 16)


def test_known_trip_count_of_xla_is_used():
  trips = ', backend_config={"known_trip_count":{"n":"7"}}'
  assert collectives(module(trips), 8)["all-gather"].calls == 7 + 1


def test_sent_bytes_match_ring_algorithms():
  found = collectives(module(), 8)
  assert found["all-reduce"].sent == pytest.approx(2 * 3 / 4 * 40)
  assert found["reduce-scatter"].sent == pytest.approx(3 / 4 * 4 * 8)
  assert found["collective-permute"].sent == 32
  assert "all-to-all" not in found


def test_empty_replica_groups_mean_all_devices():
  found = collectives(module(reduce="replica_groups={}"), 8)
  assert found["all-reduce"].sent == pytest.approx(2 * 7 / 8 * 40)


def test_one_collective_in_several_fusions_counts_once():
  again = module().replace("fusion(%x)", "fusion(%x), calls=%inside", 1)
  assert again != module()
  assert collectives(again, 8)["all-gather"].calls <= 2 * 5 + 1
  twice = module().replace(
    "ROOT %g =",
    "%g2 = bf16[4,3]{1,0} all-gather(%q), channel_id=1, replica_groups={{0,1}}\n"
    "  ROOT %g =",
  )
  assert collectives(twice, 8)["all-gather"].calls == 5 + 1


# As the TPU's compiler prints it, with the attributes that matter.
TPU = """HloModule jit_f

%all-reduce-scatter.8 (x: f32[16,4]) -> f32[2,4] {
  %x = f32[16,4]{1,0} parameter(0)
  %sum = f32[16,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={2,4}
}

ENTRY %main (w: f32[16,4]) -> f32[2,4] {
  %w = f32[16,4]{1,0} parameter(0)
  %p = f32[2,4]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.8
  %t = token[] after-all()
  %s = (f32[2,4]{1,0}, u32[], token[]) send(%p, %t), channel_id=3, ATTRIBUTES
  %d = token[] send-done(%s), channel_id=3, ATTRIBUTES
  ROOT %r = (f32[2,4]{1,0}, token[]) recv-done(%d), channel_id=3, ATTRIBUTES
}
""".replace(
  "ATTRIBUTES",
  'is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",'
  '_xla_megascale_transfer_type="ALL_REDUCE"}',
)


def test_sum_of_which_a_tpu_keeps_a_part_is_a_reduce_scatter():
  found = collectives(TPU, 16, num_slices=2)
  assert "all-reduce" not in found
  assert found["reduce-scatter"].sent == 7 / 8 * 4 * 16 * 4


@pytest.mark.parametrize(("slices", "share"), [(2, 1), (4, 3 / 2)])
def test_transfers_between_slices_are_counted_apart(slices, share):
  found = collectives(TPU, 8 * slices, num_slices=slices)["all-reduce between slices"]
  assert (found.calls, found.sent) == (1, share * 4 * 2 * 4)
