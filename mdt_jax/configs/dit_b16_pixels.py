"""DiT-B/16 on the pixels of ImageNet 256x256, without an autoencoder.

python -m mdt_jax.main --config=configs/dit_b16_pixels.py \\
  --workdir=runs/dit_b16_pixels --config.data.path=IMAGES

IMAGES: a folder of images, or ImageNet's tar file (docs/data.md).
Hardware: that of configs/dit_b2.py for each 256 images of the batch: 256 tokens too.
A recipe in the manner of JiT-B/16 (arXiv 2511.13720), not JiT itself: process, times,
optimizer, sampler and bottleneck before the tokens are JiT's; the blocks are DiT's,
without SwiGLU, RMSNorm, rotary positions and class tokens in the context.
Not run at this size.
"""

from ml_collections import ConfigDict

from mdt_jax.config import default_config

STEPS_PER_EPOCH = 1_281_167 // 1024


def get_config() -> ConfigDict:
  config = default_config()
  config.num_steps = 600 * STEPS_PER_EPOCH
  config.batch_size = 1024

  config.model.name = "DiT-B/16"
  config.model.input_size = 256
  config.model.in_channels = 3
  config.model.patch_bottleneck = 128

  config.masking.ratio = 0.0
  config.masking.width = 0.0

  # The network predicts the image, and the loss is that of the velocity.
  config.diffusion.process = "flow"
  config.diffusion.arguments = dict(
    prediction="x0",
    loss_weight="velocity",
    time_distribution="logit_normal",
    time_mean=-0.8,
    time_std=0.8,
  )

  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 2e-4
  config.optimizer.warmup_steps = 5 * STEPS_PER_EPOCH
  config.optimizer.b2 = 0.95
  config.optimizer.clip_norm = 0.0

  config.data.source = "images"

  config.sampling.method = "ode_heun"
  config.sampling.num_steps = 50
  config.sampling.cfg_scale = 2.9
  config.sampling.cfg_power = 0.0
  config.sampling.cfg_channels = 0  # all
  config.sampling.cfg_interval = (0.0, 0.9)  # of the noise; JiT counts from noise
  return config
