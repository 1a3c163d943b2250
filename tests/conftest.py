"""Shared by all tests: one cache of compiled functions, also for commands started."""

from __future__ import annotations

import os
import tempfile

# Before JAX is imported. Tests compile the same small programs again and again.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="mdt_jax_compiled_")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Compiling takes most of the time, and half of it without LLVM's optimizations. All
# tests pass with them too: XLA_FLAGS= python -m pytest
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
