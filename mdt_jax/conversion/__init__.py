"""Old name of `mdt_jax.pretrained`, kept for code that imports the old name."""
