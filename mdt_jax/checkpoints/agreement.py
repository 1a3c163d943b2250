"""What went wrong on one process, told to all processes of a run."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

MAX_REASON = 300  # length limit of a library's error message in ours


def reason_of(error: BaseException) -> str:
  """The message of an exception on one line, cut to `MAX_REASON` characters."""
  return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__


def on_any_process(text: str) -> str:
  """Returns, on all processes, the text of the first process with a non-empty text.

  All processes must call this function together.
  """
  if jax.process_count() == 1:
    return text
  padded = np.zeros(MAX_REASON, np.uint8)
  encoded = np.frombuffer(text.encode()[:MAX_REASON], np.uint8)
  padded[: encoded.size] = encoded
  every = multihost_utils.process_allgather(padded)
  said = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in every)
  return next(filter(None, said), "")
