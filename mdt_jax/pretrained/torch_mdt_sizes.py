"""Infers the sizes of the released networks from the names and shapes of tensors.

Some attributes are not in the shapes: whether a DiT is a SiT or a TREAD, the number of
heads of these, the route of a TREAD, the decoder blocks of an MDT v1, and whether the
label table has a row for the null label. They come from the caller, from what the file
says about itself, or from the released code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mdt_jax.errors import SettingError
from mdt_jax.models.registry import SIZES
from mdt_jax.pretrained import torch_mdt_layout as layout
from mdt_jax.pretrained.torch_names import some_names

# decode_depth of the released MDT v1, which cannot be inferred from the tensors.
MDT_DECODE_DEPTH = 2
# Attributes that `notes` stores in a file, because shapes do not always show them.
ROUTE = ("route_start", "route_end")
NOTED = (
  *("variant", "num_classes", "label_dropout", "num_heads", "decode_depth"),
  *("input_size", "patch_size", "mixer_num_heads", "decoder_num_heads", *ROUTE),
)
# Sizes that a file may state. The tensors of most networks show the last two.
STATED = (
  *("num_classes", "num_heads", "decode_depth", "mixer_num_heads"),
  *("decoder_num_heads", "input_size", "patch_size"),
)
NOTES_NAME = "mdt_jax"  # name of the notes in the metadata of a file
IMAGENET_CLASSES = 1000
LABEL_TABLE = "y_embedder.embedding_table.weight"
# Networks whose tensors have the names and shapes of a DiT: SiT (arXiv 2401.08740), a
# flow model, and TREAD (arXiv 2501.04765), trained by EDM.
_LIKE_DIT = ("DiT", "SiT", "TREAD")
_LOOKALIKE = r"(?i)\b(sit|tread)(?![a-z])"
# Where training arguments and metadata name the network.
_NETWORK_NAMES = ("model", "network", "net", "arch", "architecture", "name", "title")


def infer_attributes(
  tensors: Mapping[str, np.ndarray],
  source: str = "tensors",
  known: Mapping[str, Any] | None = None,
  num_classes: int | None = None,
) -> dict[str, Any]:
  """Infers the attributes of a network from the names and shapes of its tensors.

  A SiT is read as a DiT with learned variance, and a TREAD as a DiT; see
  `tell_dits_apart`.

  Args:
    tensors: released name -> array.
    source: name of the tensors in errors.
    known: attributes that the file states, see `stated_sizes`. Values that contradict
      the shapes are ignored.
    num_classes: number of classes, without the null label; None if not known.

  Returns:
    Attributes for `create_model`. `num_heads` is None for a DiT of unpublished width
    whose number of heads is not known; `decode_depth` of an MDT v1 is MDT_DECODE_DEPTH
    unless known. `label_dropout` is 0 if the label table has no row for the null label,
    and absent otherwise.

  Raises:
    SettingError: a tensor that determines an attribute is missing or has the wrong
      shape. Setting "num_classes": it does not fit the label table; or it is None, and
      the table has IMAGENET_CLASSES rows, so it is unlikely that one of them is that of
      the null label.
  """
  known = known or {}
  if any(name.startswith("en_inblocks.") for name in tensors):
    variant, first = "MDTv2", "en_inblocks.0"
  elif "de_blocks.0.attn.qkv.weight" in tensors:
    variant, first = "MDTv2", "de_blocks.0"
  else:
    variant = "MDT" if "decoder_pos_embed" in tensors else "DiT"
    first = "blocks.0"

  def shape(name: str, axes: int) -> tuple[int, ...]:
    return shape_of(tensors, name, axes, source, "an MDT, MDTv2, DiT or SiT")

  hidden_size, in_channels, _, patch_size = shape("x_embedder.proj.weight", 4)
  length = shape("pos_embed", 3)[1]
  rows = label_rows(shape, known)
  out_rows = shape("final_layer.linear.weight", 2)[0]
  mlp_size = shape(f"{first}.mlp.fc1.weight", 2)[0]
  has_bias = variant != "DiT"
  heads = shape(f"{first}.{layout.BIAS_TABLE}", 2)[1] if has_bias else None
  # Shapes that contradict each other must not ask for arrays larger than the file.
  largest = length * max(hidden_size, length if has_bias else 0)
  if largest > sum(tensor.size for tensor in tensors.values()):
    raise SettingError(
      "tensors",
      source,
      f"must hold an MDT, MDTv2, DiT or SiT: pos_embed of {length} tokens does not fit "
      "the other tensors",
    )
  num_classes, has_null = count_classes(rows, num_classes, known, source)
  attributes: dict[str, Any] = dict(
    variant=variant,
    input_size=round(length**0.5) * patch_size,
    patch_size=patch_size,
    in_channels=in_channels,
    num_classes=num_classes,
    hidden_size=hidden_size,
    mlp_ratio=mlp_ratio(hidden_size, mlp_size),
    learn_sigma=out_rows == 2 * in_channels * patch_size**2,
  )
  if not has_null:
    attributes["label_dropout"] = 0.0
  if variant == "DiT":
    published = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
    heads = known.get("num_heads", published.get(hidden_size))
  attributes["num_heads"] = heads
  if variant == "MDTv2":
    attributes["decode_depth"] = count_blocks(tensors, "de_blocks")
    pairs = count_blocks(tensors, "en_inblocks")
    attributes["depth"] = 2 * pairs + attributes["decode_depth"]
  else:
    attributes["depth"] = count_blocks(tensors, "blocks")
    if variant == "MDT":
      attributes["decode_depth"] = known.get("decode_depth", MDT_DECODE_DEPTH)
  return attributes


def shape_of(
  tensors: Mapping[str, np.ndarray], name: str, axes: int, source: str, what: str
) -> tuple[int, ...]:
  """Returns the shape of a tensor with `axes` axes, none of them of length 0.

  Args:
    tensors: released name -> array.
    name: released name.
    axes: number of axes.
    source: name of the tensors in errors.
    what: what the tensors should hold, for errors.

  Raises:
    SettingError: the tensor is missing or has another shape.
  """
  found = tensors[name].shape if name in tensors else None
  if found is None or len(found) != axes or 0 in found:
    problem = "is missing" if found is None else f"has shape {found}"
    accepted = f"must hold {what}: {name} {problem}; {some_names(tensors)}"
    raise SettingError("tensors", source, accepted)
  return found


def stated_sizes(metadata: Mapping[str, Any]) -> dict[str, int]:
  """Returns the sizes that a file states about its network, by attribute.

  Args:
    metadata: metadata of the file, see `tensors.WeightFile`: the notes of this package,
      or training arguments.
  """
  noted = read_notes(metadata)
  stated = {**metadata, **noted}
  known = {
    name: stated[name]
    for name in STATED
    if type(stated.get(name)) is int and stated[name] > 0
  }
  if noted.get("label_dropout") == 0:  # a MaskDiT's label table does not show it
    known["label_dropout"] = 0
  return known


def notes(attributes: Mapping[str, Any], **more: Any) -> dict[str, str]:
  """Returns metadata for a file with this network, which `read_notes` reads.

  Args:
    attributes: attributes of the network.
    **more: further values, of JSON's types.
  """
  noted = {name: attributes[name] for name in NOTED if name in attributes} | more
  return {NOTES_NAME: json.dumps(noted)}


def read_notes(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the notes that this package wrote to a file; empty if there are none."""
  text = metadata.get(NOTES_NAME)
  if not isinstance(text, str):
    return {}
  try:
    found = json.loads(text)
  except (ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def tell_dits_apart(
  tensors: Mapping[str, np.ndarray],
  attributes: Mapping[str, Any],
  metadata: Mapping[str, Any],
  source: str,
  network: str | None,
  process: str | None = None,
) -> dict[str, Any]:
  """Returns the attributes of a DiT, or of the SiT or TREAD that its tensors belong to.

  All have tensors of the same names and shapes. In order of weight: what the file says
  about itself, the caller's `network` and `process`, and hints. A hint raises an error,
  because nothing decides: the name of the file; or rows of the last layer that are zero
  where a DiT has its variance, since SiT's loss ignores them.

  Args:
    tensors: released name -> array.
    attributes: attributes that `infer_attributes` returned.
    metadata: metadata of the file.
    source: path of the file.
    network: the network that the caller expects; None if the caller does not say.
    process: the process that trained the network; None if the caller does not say.

  Raises:
    SettingError: setting "network": it does not fit the tensors or the file. Setting
      "tensors": the file seems to hold a SiT and nothing decides.
  """
  variant = attributes["variant"]
  if variant != "DiT":
    if network not in (None, variant):
      raise SettingError("network", network, f"must be {variant}, as in {source}")
    return dict(attributes)
  if network not in (None, *_LIKE_DIT):
    accepted = f"must be DiT, SiT or TREAD, as in {source}"
    raise SettingError("network", network, accepted)
  has_both_halves = attributes["learn_sigma"]
  stated, text = _stated_network(metadata)
  if stated in ("SiT", "TREAD"):
    if network not in (None, stated):
      raise SettingError("network", network, f"must be {stated}, as its {text} says")
    network = stated
  elif network is None and stated is None and process == "flow" and has_both_halves:
    network = "SiT"
  elif network is None and stated is None and process is None:
    hint = None
    if re.search(
      r"(?i)\bsit[-_](s|b|l|xl)\b", source.rpartition("/")[2].replace("_", "-")
    ):
      hint = "its name is that of a SiT"
    if _leaves_variance_at_zero(tensors, attributes):
      hint = (
        "the rows of final_layer.linear.weight for the variance are zero, as in a SiT"
      )
    if hint:
      raise SettingError(
        "tensors",
        source,
        f"{hint}, whose tensors have the names and shapes of a DiT: network=SiT reads "
        "it as a SiT, network=DiT as a DiT",
      )
  if network == "TREAD":
    noted = read_notes(metadata)
    route = {name: noted[name] for name in ROUTE if type(noted.get(name)) is int}
    return {**attributes, **route, "variant": "TREAD"}
  if network != "SiT":
    return dict(attributes)
  if not has_both_halves:
    channels = attributes["in_channels"]
    raise SettingError(
      "network",
      "SiT",
      f"must be DiT: the last layer of {source} has {channels} channels, and that of a "
      f"SiT has {2 * channels}",
    )
  return {**attributes, "variant": "SiT", "learn_sigma": False}


def _stated_network(metadata: Mapping[str, Any]) -> tuple[str | None, str]:
  """Returns which network a file says that it holds, and where it says so.

  Returns:
    ("SiT", "TREAD", or for notes of this package any variant; the name and the value of
    the entry). (None, "") if the file does not say.
  """
  variant = read_notes(metadata).get("variant")
  if isinstance(variant, str):
    return variant, f"variant {variant!r}"
  for name in (*_NETWORK_NAMES, "path_type"):
    text = str(metadata.get(name, ""))[:80]
    found = re.search(_LOOKALIKE, text)
    if found:
      return {"sit": "SiT", "tread": "TREAD"}[found[1].lower()], f"{name} {text!r}"
    if name == "path_type" and text:  # only SiT's training code has a path_type
      return "SiT", f"{name} {text!r}"
  return None, ""


def describe(attributes: Mapping[str, Any]) -> str:
  """Describes which network the tensors were read as, for errors."""
  widths = attributes.get("mlp_widths", ())  # one for each block of a MicroDiTText
  sizes = (
    attributes.get("depth", len(widths)),
    attributes["hidden_size"],
    attributes["patch_size"],
  )
  size = "x".join(map(str, sizes))
  return f"read as {attributes['variant']} (depth x width x patch = {size})"


def describe_fully(attributes: Mapping[str, Any]) -> str:
  """Describes all that was inferred or assumed about a network, in one line."""
  side, channels = attributes["input_size"], attributes["in_channels"]
  has_null = attributes.get("label_dropout", 1) > 0
  blocks = f"{attributes['num_heads']} heads"
  if attributes["variant"] in ("MDT", "MDTv2"):
    blocks += f", {attributes['decode_depth']} decode blocks"
  if attributes["variant"] == "MicroDiT":
    heads = attributes["mixer_num_heads"]
    blocks += f", {attributes['mixer_depth']} mixer blocks of width "
    blocks += f"{attributes['mixer_hidden_size']}"
    blocks += f" and {heads} heads" if heads else " and heads of the same size"
  if attributes["variant"] == "SPRINT":
    outer = (str(attributes[name]) for name in ("encoder_depth", "decode_depth"))
    blocks += f", {' + '.join(outer)} blocks before and after the middle blocks"
  if attributes["variant"] == "MaskDiT":
    blocks += f", a decoder of {attributes['decode_depth']} blocks, width "
    blocks += f"{attributes['decoder_hidden_size']} and "
    blocks += f"{attributes['decoder_num_heads']} heads"
  classes = f"{attributes['num_classes']} classes "
  classes += f"{'and a' if has_null else 'without a'} null label"
  if (condition := attributes.get("condition")) is not None:
    arrays = [f"{name} {shape}" for name, shape in condition.arrays().items()]
    classes = ", ".join([classes] * (condition.label is not None) + arrays)
  variance = "learned" if attributes["learn_sigma"] else "no learned"
  return (
    f"{describe(attributes)}, {blocks}; input {side} x {side} x {channels}; "
    f"{classes}; {variance} variance"
  )


def mlp_ratio(hidden_size: int, mlp_size: int) -> float:
  """Returns a ratio with int(hidden_size * ratio) == mlp_size despite rounding."""
  ratio = mlp_size / hidden_size
  return (
    ratio if int(hidden_size * ratio) == mlp_size else math.nextafter(ratio, 2 * ratio)
  )


def label_rows(
  shape: Callable[[str, int], tuple[int, ...]], known: Mapping[str, Any]
) -> int:
  """Returns the rows of the label table, also of a network that has none.

  Args:
    shape: (name of a tensor, number of axes) -> shape.
    known: what the file states, see `infer_attributes`. "no_label_table" is 1 if
      the condition of the network has no labels.
  """
  if "no_label_table" in known:
    return known["num_classes"] + (known.get("label_dropout") != 0)
  return shape(LABEL_TABLE, 2)[0]


def count_classes(
  rows: int, asked: int | None, known: Mapping[str, Any], source: str
) -> tuple[int, bool]:
  """Returns the number of classes, and whether the label table has a null row.

  Args:
    rows: number of rows of the table.
    asked: number of classes that the caller states; None if the caller does not.
    known: what the file states, see `infer_attributes`.
    source: name of the tensors in errors.
  """
  accepted = (
    f"must be {rows - 1} (the last row is that of the null label) or {rows} (no null "
    f"label): the label table of {source} has {rows} rows"
  )
  if asked is None and known.get("num_classes") in (rows, rows - 1):
    asked = known["num_classes"]
  if asked is None and rows != IMAGENET_CLASSES:
    return rows - 1, True
  if asked not in (rows, rows - 1):
    raise SettingError("num_classes", asked, accepted)
  return asked, asked < rows


def _leaves_variance_at_zero(
  tensors: Mapping[str, np.ndarray], attributes: Mapping[str, Any]
) -> bool:
  """Whether the output is trained, but not its channels for the variance."""
  if not attributes["learn_sigma"]:
    return False
  channels, patch = attributes["in_channels"], attributes["patch_size"]
  weight = tensors["final_layer.linear.weight"]
  rows = weight.reshape(patch**2, 2 * channels, -1)
  return bool(rows[:, :channels].any() and not rows[:, channels:].any())


def count_blocks(tensors: Mapping[str, np.ndarray], stack: str) -> int:
  """Returns the number of blocks in a stack, such as "de_blocks"."""
  return len({name.split(".")[1] for name in tensors if name.startswith(f"{stack}.")})
