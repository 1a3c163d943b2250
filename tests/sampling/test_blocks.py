"""Request: how the images of a request are divided into blocks."""

from __future__ import annotations

import numpy as np

from mdt_jax.sampling.blocks import Request

LABELS = np.array([3, 1, 4, 1, 5])


def test_last_block_is_padded_with_the_first_images():
  request = Request(LABELS, seed=0, block_size=2)
  assert [request.ids(block).tolist() for block in range(3)] == [[0, 1], [2, 3], [4]]
  labels, ids, given = request.inputs([2, 0])
  assert (labels.tolist(), ids.tolist()) == ([5, 3, 3, 1], [4, 0, 0, 1])
  assert given == {}


def test_request_accepts_one_input_image_or_one_per_image():
  images = np.arange(5.0).reshape(5, 1, 1, 1)
  own = Request(LABELS, seed=0, block_size=2, image=images).inputs([1])[2]
  assert own["image"].ravel().tolist() == [2, 3]
  same = Request(LABELS, seed=0, block_size=2, image=images[4]).inputs([1])[2]
  assert same["image"].ravel().tolist() == [4, 4]
