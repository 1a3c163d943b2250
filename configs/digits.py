"""A small MDTv2 on scikit-learn's handwritten digits (8x8 pixels, ten classes).

python -m mdt_jax.main --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

from mdt_jax.config import default_config


def get_config() -> ConfigDict:
  config = default_config()
  config.num_steps = 1500
  config.batch_size = 128

  config.model.input_size = 8
  config.model.in_channels = 1
  config.model.num_classes = 10
  config.model.patch_size = 2
  config.model.hidden_size = 128
  config.model.depth = 6
  config.model.num_heads = 4
  config.model.decode_depth = 2
  config.model.unroll = -1

  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50
  config.ema_decays = (0.995,)

  config.data.source = "digits"
  config.data.flip = False
  config.data.num_threads = 0

  config.sampling.num_steps = 100
  config.sampling.cfg_scale = 2.0

  config.log_every = 50
  config.checkpoint_every = 500
  config.sample_every = 500
  config.num_samples = 100
  return config
