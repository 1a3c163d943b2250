"""The logger of the package; commands format its lines, see `mdt_jax.cli`."""

from __future__ import annotations

import logging

logger = logging.getLogger("mdt_jax")
