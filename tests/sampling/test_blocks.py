"""Request: how the images of a request are divided into blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.sampling.blocks import BlockGenerator, Request, generate_batches

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


def test_images_that_are_not_finite_are_counted_in_a_warning(caplog):
  def generator(params, labels, ids, seed, given=None):
    return jnp.where(ids[:, None, None, None] % 3 == 1, jnp.nan, jnp.ones((1, 2, 2, 1)))

  request = Request(np.zeros(7, int), 0, 4)
  blocks = BlockGenerator(generator, lambda _, latents: latents, jax.devices()[:1])
  with caplog.at_level("WARNING", "mdt_jax"):
    found = dict(blocks({}, {}, request))
    (batch, *_) = generate_batches(generator, {}, request.labels, seed=0, batch_size=7)
  assert found[1].shape == (3, 2, 2, 1) and batch.shape == (7, 2, 2, 1)
  starts = ["images 0 to 3: 1 hold", "images 4 to 6: 1 hold", "images 0 to 6: 2 hold"]
  found = [message[: len(starts[0])] for message in caplog.messages]
  assert found == starts
