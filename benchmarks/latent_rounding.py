"""Measures the error of 16-bit latents: python -m benchmarks.latent_rounding --vae=DIR

The benchmark encodes photographs of scikit-image and scikit-learn (pip install
scikit-image) and rounds the mean and the standard deviation of the posterior to the
16-bit types of `mdt_jax.encode`. Then it decodes the means, and compares the pixels
with those of float32 latents. Without --vae, the benchmark first trains a small
autoencoder on the photographs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from PIL import Image

from mdt_jax.data import latent_card, transforms
from mdt_jax.models.autoencoder_kl import AutoencoderKL
from mdt_jax.pretrained.autoencoder import Autoencoder

VAE = flags.DEFINE_string("vae", None, "Autoencoder, a folder or Hugging Face id.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 128, "Side of the crops, in pixels.")
STEPS = flags.DEFINE_integer("steps", 200, "Training steps of the small autoencoder.")

COLOURED = ("astronaut", "chelsea", "coffee", "rocket")
GREY = ("brick", "camera", "coins", "grass", "gravel", "moon", "page")
KL_WEIGHT = 1e-6  # of the sum over latents, as in Stable Diffusion
CROP, BATCH = 64, 8


def photographs(size: int) -> np.ndarray:
  """Centre crops (N, size, size, 3) uint8 of photographs and of their quarters."""
  import skimage.data
  from sklearn.datasets import load_sample_images

  arrays = [getattr(skimage.data, name)() for name in COLOURED + GREY]
  arrays += load_sample_images().images
  crops = []
  for array in arrays:
    image = Image.fromarray(array).convert("RGB")
    width, height = image.size
    middle = width // 2, height // 2
    quarters = [
      (left, top, left + middle[0], top + middle[1])
      for left in (0, middle[0])
      for top in (0, middle[1])
    ]
    parts = [image, *(image.crop(box) for box in quarters)]
    crops += [np.asarray(transforms.center_crop(part, size)) for part in parts]
  return np.stack(crops)


def train(images: np.ndarray, steps: int) -> Autoencoder:
  """Trains a small autoencoder on crops of the images: squared error and weak KL."""
  model = AutoencoderKL(block_out_channels=(16, 32, 64, 64), norm_num_groups=8)
  floats = transforms.to_float(images)
  optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

  def loss_fn(params, batch, key):
    mean, logvar = model.apply({"params": params}, batch, method="encode")
    draw = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    decoded = model.apply({"params": params}, draw, method="decode")
    kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar)
    error = jnp.square(decoded - batch)
    return (error.sum() + KL_WEIGHT * kl.sum()) / len(batch) / CROP**2

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, batch, key):
    gradients = jax.grad(loss_fn)(params, batch, key)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  params = jax.jit(model.init)(jax.random.key(0), floats[:1, :CROP, :CROP])["params"]
  state = optimizer.init(params)
  rng = np.random.default_rng(0)
  for n in range(steps):
    corners = rng.integers(0, floats.shape[1] - CROP + 1, (BATCH, 2))
    chosen = rng.integers(0, len(floats), BATCH)
    batch = np.stack(
      [
        floats[i, top : top + CROP, left : left + CROP]
        for i, (top, left) in zip(chosen, corners, strict=True)
      ]
    )
    params, state = step(params, state, batch, jax.random.key(n))
  moments = Autoencoder(model, params).moments(images)
  scale = model.scaling_factor / float(np.std(moments[:, 0]))
  return Autoencoder(model.clone(scaling_factor=scale), params)


def report(vae: Autoencoder, images: np.ndarray) -> None:
  """Prints the rounding errors of latents and of decoded pixels.

  Errors of the posterior's mean and std are relative to the std: the median error of
  the mean, the 99th percentile of that error, and the median error of the std. Errors
  of pixels are in levels of 0 ... 255: their mean and maximum.
  """
  moments = np.concatenate([np.asarray(vae.moments(image[None])) for image in images])
  mean, std = moments[:, 0], moments[:, 1]
  decoded = vae.decode(mean)
  error = 127.5 * np.sqrt(np.mean((decoded - transforms.to_float(images)) ** 2))
  print(
    f"{len(images)} images of {images.shape[1]} pixels; std of the means "
    f"{mean.std():.2f}, of the posteriors {np.median(std):.1e} (median); error of the "
    f"autoencoder {error:.1f} of 255 (root mean square)\n"
  )
  noise = np.random.default_rng(0).standard_normal(mean.shape, np.float32)
  print(f"{'':<16}{'mean':>10}{'99%':>10}{'std':>12}{'pixels':>10}{'most':>8}")
  for name, dtype in latent_card.DTYPES.items():
    rounded = moments.astype(dtype).astype(np.float32)
    off = np.abs(rounded - moments) / std[:, None]
    print(
      f"{name:<16}{np.median(off[:, 0]):>10.1e}{np.quantile(off[:, 0], 0.99):>10.1e}"
      f"{np.median(off[:, 1]):>12.1e}{_pixels(vae.decode(rounded[:, 0]), decoded)}"
    )
  draw = vae.decode(mean + std * noise)
  print(f"{'posterior draw':<16}{'':>32}{_pixels(draw, decoded)}")


def _pixels(images: jax.Array, expected: jax.Array) -> str:
  """Formats mean and maximum of the difference, in levels of 0 ... 255."""
  off = 127.5 * np.abs(images - expected)
  return f"{off.mean():>10.4f}{off.max():>8.3f}"


def main(argv: list[str]) -> None:
  del argv
  images = photographs(IMAGE_SIZE.value)
  vae = Autoencoder.load(VAE.value) if VAE.value else train(images, STEPS.value)
  report(vae, images)


if __name__ == "__main__":
  app.run(main)
