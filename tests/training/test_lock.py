import os
import subprocess
import sys

import pytest

from mdt_jax.errors import SettingError
from mdt_jax.training.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from mdt_jax.training.lock import locked
with locked(Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_second_run_is_told_who_is_at_work(tmp_path):
  with locked(tmp_path), pytest.raises(SettingError) as error, locked(tmp_path):
    pass
  message = f"another run is at work on it: process {os.getpid()} on "
  assert message in str(error.value)


def test_a_lock_goes_with_its_process_however_that_ends(tmp_path):
  command = [sys.executable, "-c", HOLD, tmp_path]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "held\n"
    refused = pytest.raises(SettingError, match=f"process {process.pid} on")
    with refused, locked(tmp_path):
      pass
    process.kill()
  with locked(tmp_path):
    pass
