"""Runs a command, and checks that it refuses its flags."""

from __future__ import annotations

from tests import forked


def run(module, *flags, **options):
  """Returns exit code, output and errors; see `forked.Forked` for the options."""
  process = forked.command(module, *flags, **options)
  return process.end(), process.out, process.err


def assert_refused(result, *texts):
  """Checks for exit code 2 and one line beside progress bars, with the texts."""
  code, _, err = result
  assert code == 2, err
  (line,) = [text for text in err.splitlines() if text and "image/s" not in text]
  assert line.startswith("error: ")
  for text in texts:
    assert text in line
