"""Parameters of one network as the start of another network."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from mdt_jax import create_model
from mdt_jax.errors import SettingError
from mdt_jax.models.network import Network
from mdt_jax.models.registry import abstract_params, init_params
from mdt_jax.pretrained.adaptation import Adaptation
from mdt_jax.pretrained.tensors import flatten, unflatten
from tests import reference

TINY = dict(
  input_size=8, in_channels=3, num_classes=4, hidden_size=16, num_heads=2, depth=4
)


def tiny(variant="MDT", **attributes):
  own = {"route_start": 1, "route_end": 2} if variant == "TREAD" else {}
  if variant == "MaskDiT":
    own = {"decoder_hidden_size": 8, "decoder_num_heads": 1}
  options = {**TINY, "decode_depth": 2, **own, **attributes}
  if variant == "SPRINT":
    options = {"encoder_depth": 1, **options, "decode_depth": 1}
  return create_model(variant=variant, **options)


@functools.cache
def params_of(model):
  return flatten(reference.random_params(model))


def start(source, target, **options):
  """Parameters of `target`, from random ones of `source`; and the adaptation."""
  adaptation = Adaptation(source, target, **options)
  old = params_of(source)
  fresh = flatten(init_params(target, jax.random.key(0)))
  found = {
    path: adaptation.start(path, old.__getitem__, np.asarray(fresh[path]))
    for path in adaptation.starts
  }
  assert found.keys() == flatten(abstract_params(target)).keys()
  return found, adaptation


def forward(model, params, labels=(4, 4, 4)):
  """The output for fixed inputs; the null label by default."""
  rng = np.random.default_rng(1)
  x = rng.standard_normal((3, *model.input_shape)).astype(np.float32)
  t = np.array([0, 500, 999])
  labels = np.array(labels)
  return jax.jit(model.apply)({"params": unflatten(params)}, x, t, labels)


@pytest.mark.parametrize(
  "variant", ["DiT", "SiT", "MDT", "MDTv2", "TREAD", "MaskDiT", "MicroDiT", "SPRINT"]
)
def test_same_network_keeps_every_parameter(variant):
  source = tiny(variant)
  found, adaptation = start(source, source)
  jax.tree.map(np.testing.assert_array_equal, found, params_of(source))
  assert {start.how for start in adaptation.starts.values()} == {"kept"}
  assert not adaptation.dropped


@pytest.mark.parametrize(
  ("old", "new", "options"),
  [
    ("DiT", "MDT", {}),
    ("DiT", "MDTv2", {}),
    ("MDT", "MDTv2", {}),
    ("DiT", "TREAD", {"learn_sigma": True}),
    ("TREAD", "MDTv2", {"learn_sigma": False}),
    ("DiT", "DiT", {"depth": 6}),
    ("MDTv2", "MDTv2", {"num_classes": 7}),
    ("SPRINT", "SPRINT", {"num_classes": 7}),
    ("MaskDiT", "MaskDiT", {"num_classes": 7}),
    ("MaskDiT", "MaskDiT", {"num_classes": 2, "label_dropout": 0.0}),
    ("DiT", "MDTv2", {"num_classes": 2, "decode_depth": 4}),
  ],
)
def test_unmasked_function_is_that_of_the_old_network(old, new, options):
  source, target = tiny(old), tiny(new, **options)
  found, _ = start(source, target, partial="depth" in options)
  null = [target.num_classes] * 3
  np.testing.assert_allclose(
    forward(target, found, null),
    forward(source, params_of(source)),
    rtol=2e-6,
    atol=2e-6,
  )


def test_mdt_as_dit_drops_what_dit_lacks():
  found, adaptation = start(tiny("MDT"), tiny("DiT"))
  old = params_of(tiny("MDT"))
  kernel = "attention/qkv/kernel"
  np.testing.assert_array_equal(found[f"blocks/{kernel}"][:2], old[f"blocks/{kernel}"])
  np.testing.assert_array_equal(
    found[f"blocks/{kernel}"][2:], old[f"decode_blocks/{kernel}"]
  )
  heads = {path.split("/")[0] for path in adaptation.dropped}
  assert heads == {
    "blocks",
    "decode_blocks",
    "decode_pos_embed",
    "mask_token",
    "side_block",
  }
  bias = [path for path in adaptation.dropped if "blocks" in path.split("/")[0]]
  assert all(path.endswith("relative_position_bias") for path in bias)


def test_other_classes_keep_the_null_label_alone():
  source, target = tiny(), tiny(num_classes=9)
  found, adaptation = start(source, target)
  table, old = found["label_embed/table"], params_of(source)["label_embed/table"]
  assert table.shape == (10, 16)
  np.testing.assert_array_equal(table[9], old[4])
  assert 0.01 < table[:9].std() < 0.03  # the released deviation is 0.02
  note = adaptation.starts["label_embed/table"].note
  assert note == "0 of 9 classes kept, the others new; null label kept"


def test_classes_are_mapped():
  source, target = tiny(), tiny(num_classes=6)
  found, _ = start(source, target, classes={0: 3, 5: 1})
  table, old = found["label_embed/table"], params_of(source)["label_embed/table"]
  np.testing.assert_array_equal(table[[0, 5, 6]], old[[3, 1, 4]])
  assert np.abs(table[1:5]).max() < 0.1 < np.abs(old).max()


@pytest.mark.parametrize(("old", "new"), [(0.1, 0.0), (0.0, 0.1)])
def test_labels_are_kept_with_and_without_a_null_label(old, new):
  source, target = tiny(label_dropout=old), tiny(label_dropout=new)
  found, _ = start(source, target)
  np.testing.assert_array_equal(
    found["label_embed/table"][:4], params_of(source)["label_embed/table"][:4]
  )


@pytest.mark.parametrize("variant", ["DiT", "MDT", "MDTv2"])
def test_other_input_size_resizes_positions_and_biases_alone(variant):
  source, target = tiny(variant), tiny(variant, input_size=(16, 12))
  found, adaptation = start(source, target)
  resized = {p for p, start in adaptation.starts.items() if start.how == "resized"}
  expected = {
    p for p in found if "pos_embed" in p or p.endswith("relative_position_bias")
  }
  assert resized == expected
  for path in found.keys() - resized:
    np.testing.assert_array_equal(found[path], params_of(source)[path])
  assert np.isfinite(forward(target, found)).all()


@pytest.mark.parametrize("patches", ["resize", "fresh"])
def test_other_patch_size(patches):
  source, target = tiny(), tiny(patch_size=4, input_size=16)
  found, adaptation = start(source, target, patches=patches)
  hows = {
    path: start.how
    for path, start in adaptation.starts.items()
    if path.startswith(("patch_embed", "final_layer/linear"))
  }
  assert (set(hows.values()) == {"new values"}) == (patches == "fresh")
  assert found["pos_embed"].shape == (16, 16)  # The grid stays.
  np.testing.assert_array_equal(found["pos_embed"], params_of(source)["pos_embed"])


def test_bottleneck_is_resized_or_starts_anew():
  source = tiny(patch_bottleneck=8)
  other, adaptation = start(source, tiny(patch_bottleneck=8, patch_size=4))
  assert other["patch_embed/bottleneck/kernel"].shape == (48, 8)
  assert adaptation.starts["patch_embed/bottleneck/kernel"].how == "resized"
  kept = "patch_embed/linear/kernel"
  np.testing.assert_array_equal(other[kept], params_of(source)[kept])
  _, adaptation = start(source, tiny())
  assert adaptation.starts[kept].how == "new values"
  assert adaptation.dropped == ["patch_embed/bottleneck/kernel"]


def test_enlarged_images_have_the_embeddings_of_the_images():
  """The network with patches of 4 embeds an enlarged image as the old one the image."""
  source, target = tiny(), tiny(patch_size=4, input_size=16)
  found, _ = start(source, target)
  kernel = params_of(source)["patch_embed/linear/kernel"].reshape(2, 2, 3, 16)
  enlarged = found["patch_embed/linear/kernel"].reshape(4, 4, 3, 16)
  # A patch of one value in all pixels is the same at any size.
  np.testing.assert_allclose(kernel.sum((0, 1)), enlarged.sum((0, 1)), rtol=1e-4)


def test_variance_is_taken_or_left():
  with_variance, without = tiny(), tiny(learn_sigma=False)
  less, _ = start(with_variance, without)
  output = forward(with_variance, params_of(with_variance))
  np.testing.assert_allclose(forward(without, less), output[..., :3], atol=1e-6)
  more, _ = start(without, with_variance)
  output = forward(with_variance, more)
  expected = forward(without, params_of(without))
  np.testing.assert_allclose(output[..., :3], expected, atol=1e-6)
  assert not output[..., 3:].any()


NO_VARIANCE = dict(learn_sigma=False)


@pytest.mark.parametrize(
  ("source", "target"),
  [
    (tiny("SiT"), tiny("SiT", num_classes=9)),
    (tiny("SiT"), tiny("MDTv2", **NO_VARIANCE)),
    (tiny("SiT"), tiny("DiT", **NO_VARIANCE)),
    (tiny("SiT"), tiny("DiT")),
    (tiny("DiT"), tiny("SiT")),
    (tiny("MDT", **NO_VARIANCE), tiny("SiT", patch_size=2)),
  ],
)
def test_sit_exchanges_its_used_channels_alone(source, target):
  found, _ = start(source, target)
  old = params_of(source)
  if source.variant == "MDT":  # its position biases are dropped
    old = {p: 0 * a if "position_bias" in p else a for p, a in old.items()}
    old["decode_pos_embed"] = 0 * old["decode_pos_embed"]
  output = forward(target, found, [target.num_classes] * 3)
  np.testing.assert_allclose(
    output[..., :3], forward(source, old)[..., :3], rtol=2e-6, atol=2e-6
  )
  assert not output[..., 3:].any()
  if target.variant == "SiT" != source.variant:
    kernel = found["final_layer/linear/kernel"].reshape(16, 4, 6)
    assert kernel[..., :3].any() and not kernel[..., 3:].any()


def test_other_channels_start_anew():
  found, adaptation = start(tiny(), tiny(in_channels=16))
  hows = {path: start.how for path, start in adaptation.starts.items()}
  new = {path for path, how in hows.items() if how == "new values"}
  layers = ("patch_embed/linear", "final_layer/linear")
  assert not adaptation.dropped  # listed once, with new values
  assert new == {f"{layer}/{leaf}" for layer in layers for leaf in ("kernel", "bias")}
  assert not found["final_layer/linear/kernel"].any()


def test_fewer_blocks_are_the_first_ones():
  source, target = tiny("DiT", depth=6), tiny("DiT", depth=4)
  found, _ = start(source, target, partial=True)
  path = "blocks/fc1/kernel"
  np.testing.assert_array_equal(found[path], params_of(source)[path][:4])


@pytest.mark.parametrize(
  ("source", "target", "dropped"),
  [
    # The last two blocks of one stack.
    (tiny("DiT", depth=6), tiny("DiT"), {"blocks": "dropped: the last 2 of 6 blocks"}),
    # All blocks of a stack whose name the new network has too.
    (tiny("MDTv2", depth=6), tiny("MDTv2"), {"decode_blocks": "dropped"}),
    # One stack in part, another as a whole.
    (
      tiny("MDT", decode_depth=1),
      tiny("DiT", depth=2),
      {"blocks": "dropped: the last 1 of 3 blocks", "decode_blocks": "dropped"},
    ),
  ],
)
def test_dropped_blocks_are_listed(source, target, dropped):
  rows = Adaptation(source, target, partial=True).describe()
  listed = {
    path.partition("/")[0]: how
    for path, _, how in rows
    if path.endswith("blocks/fc1/kernel") and how.startswith("dropped")
  }
  assert listed == dropped


class Other(Network):
  width: int = 4

  def setup(self):
    self.scale = self.param("scale", lambda key: np.ones(self.width, np.float32))

  def __call__(self, x, t, y, token_mask=None, train=False):
    return x * self.scale.mean()


@pytest.mark.parametrize(
  ("source", "target", "message"),
  [
    (tiny(), tiny(hidden_size=24), "hidden_size is 16 there and 24 here"),
    (tiny(), tiny(num_heads=4), "num_heads is 2 there and 4 here"),
    (tiny(), tiny(mlp_ratio=2.0), "mlp_ratio is 4.0 there and 2.0 here"),
    (tiny(), tiny(depth=6), "depth is 4 there and 6 here; --config.init.partial=true"),
    (tiny("MDTv2"), tiny("MDTv2", decode_depth=4), "decode_depth is 2 there and 4"),
    (tiny("MDTv2"), tiny("MDT"), "MDTv2 has long skips there, and MDT has none here"),
    (tiny("MDTv2"), tiny("DiT"), "MDTv2 has long skips there, and DiT has none here"),
    (tiny(), tiny("MicroDiT"), "the network is MDT there and MicroDiT here"),
    (tiny("MicroDiT"), tiny("DiT"), "the network is MicroDiT there and DiT here"),
    (tiny("MicroDiT"), tiny("MicroDiT", mixer_depth=2), "mixer_depth is 3 there and 2"),
    (Other(), Other(width=5), r"scale is \(4,\) there and \(5,\) here"),
    (Other(), tiny(), "missing there and"),
    (tiny(), Other(), "scale is missing there and"),
  ],
)
def test_networks_that_do_not_fit_are_refused(source, target, message):
  with pytest.raises(SettingError, match=f"^path = 'a.pt': does not fit: .*{message}"):
    Adaptation(source, target, name="a.pt")


@pytest.mark.parametrize("sizes", [{}, {"mixer_hidden_size": 8}])
def test_partial_keeps_all_but_the_mixer(sizes):
  source, target = tiny("DiT"), tiny("MicroDiT", learn_sigma=True, **sizes)
  found, adaptation = start(source, target, partial=True)
  new = {path for path, start in adaptation.starts.items() if start.how != "kept"}
  assert new == {path for path in found if path.startswith("mixer_")}
  if not sizes:  # gates of new blocks are zero
    np.testing.assert_allclose(
      forward(target, found), forward(source, params_of(source)), atol=1e-5
    )


def test_partial_accepts_other_depths_and_variants():
  for source, target in (
    (tiny("MDTv2"), tiny("DiT")),
    (tiny("MDTv2"), tiny("MDTv2", decode_depth=4)),
    (tiny("MDT", depth=6), tiny("MDTv2", depth=8)),
  ):
    start(source, target, partial=True)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
  ("old", "new", "text"),
  [
    (("DiT", {}), ("SPRINT", {}), "the network is DiT there and SPRINT here"),
    (("SPRINT", {}), ("MDT", {}), "the network is SPRINT there and MDT here"),
    (("SPRINT", {}), ("SPRINT", {"depth": 5}), "depth is 4 there and 5 here"),
    (
      ("SPRINT", {}),
      ("SPRINT", {"encoder_depth": 2}),
      "encoder_depth is 1 there and 2 here",
    ),
  ],
)
def test_sprint_fits_no_other_network(old, new, text, partial):
  networks = [tiny(variant, **attributes) for variant, attributes in (old, new)]
  with pytest.raises(SettingError) as error:
    Adaptation(*networks, partial=partial)
  assert error.value.accepted == f"does not fit: {text}"


def test_sprint_of_another_input_keeps_its_blocks():
  """There are no positions to resize."""
  source, target = tiny("SPRINT"), tiny("SPRINT", input_size=(8, 12), in_channels=1)
  found, adaptation = start(source, target)
  how = {path: start.how for path, start in adaptation.starts.items()}
  new = {path for path, start in how.items() if start != "kept"}
  assert {path.rpartition("/")[0] for path in new} == {
    "patch_embed/linear",
    "final_layer/linear",
  }
  old = params_of(source)
  for path in found.keys() - new:
    np.testing.assert_array_equal(found[path], old[path])
