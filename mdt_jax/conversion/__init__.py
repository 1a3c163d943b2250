"""The earlier address of `mdt_jax.pretrained`, kept for code that imports it."""
