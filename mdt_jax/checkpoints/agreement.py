"""What went wrong on one process, told to all processes of a run."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

MAX_BYTES = 1200  # of the text; `errors.one_line` returns at most 300 characters


def on_any_process(text: str) -> str:
  """Returns, on all processes, the text of the first process with a non-empty text.

  All processes must call this function together.
  """
  if jax.process_count() == 1:
    return text
  padded = np.zeros(MAX_BYTES, np.uint8)
  encoded = np.frombuffer(text.encode()[:MAX_BYTES], np.uint8)
  padded[: encoded.size] = encoded
  every = multihost_utils.process_allgather(padded)
  said = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in every)
  return next(filter(None, said), "")
