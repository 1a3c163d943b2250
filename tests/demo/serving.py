"""A running demo in a process of its own, and sessions that talk to it over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 120  # that the demo may take to start, and a session to end
INSTALL = "bash launch/demo_test.sh runs it"
NO_GRADIO = importlib.util.find_spec("gradio") is None
NO_GRADIO_REASON = f"needs gradio; {INSTALL}"


def chromium() -> str | None:
  """The path of a Chromium, or None."""
  names = "chromium", "chromium-browser", "google-chrome"
  return next(filter(None, map(shutil.which, names)), None)


class Demo:
  """A demo of a run, on a free port.

  Args:
    checkpoint: folder of the run.
  """

  def __init__(self, checkpoint: Path):
    self.folder = Path(tempfile.mkdtemp(prefix="mdt_jax_test_"))
    self._lines: queue.Queue[str] = queue.Queue()
    self.log: list[str] = []
    command = [sys.executable, "-u", "-m", "mdt_jax.demo", "--port=0"]
    environment = {
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "TMPDIR": str(self.folder),
      "no_proxy": "*",
    }
    self._process = subprocess.Popen(
      [*command, f"--checkpoint={checkpoint}"],
      cwd=self.folder,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    threading.Thread(target=self._read, daemon=True).start()
    self.url = self._wait_for("open http").split()[1]

  def _read(self) -> None:
    assert self._process.stdout is not None
    for line in self._process.stdout:
      self.log.append(line)
      self._lines.put(line)
    self._lines.put("")

  def _wait_for(self, text: str) -> str:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
      line = self._lines.get(timeout=SECONDS)
      if text in line:
        return line
      if not line:
        break
    raise AssertionError(f"the demo did not start: {''.join(self.log)}")

  @property
  def is_alive(self) -> bool:
    return self._process.poll() is None

  def memory(self) -> int:
    """Resident memory in bytes."""
    status = Path(f"/proc/{self._process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024

  def files(self) -> list[Path]:
    """The files and folders that the demo has written."""
    return list(self.folder.iterdir())

  def end(self, number: int = signal.SIGINT) -> int:
    """Ends the demo by a signal; returns its exit code."""
    if self.is_alive:
      self._process.send_signal(number)
    try:
      return self._process.wait(timeout=30)
    except subprocess.TimeoutExpired:
      self._process.kill()
      raise


class Session:
  """A browser's session: presses buttons over HTTP.

  Args:
    demo: the running demo.
    config: the page's config, from `read_config`.
  """

  def __init__(self, demo: Demo, config: dict[str, Any]):
    import httpx

    self._demo = demo
    self._config = config
    self._hash = secrets.token_hex(6)
    self._client = httpx.Client(base_url=demo.url, timeout=SECONDS, trust_env=False)

  def press(self, button: str, data: list[Any]) -> Any:
    """Presses a button; yields the messages of the server until the last one.

    Args:
      button: elem_id of the button.
      data: values of the inputs of its handler; None for a state.
    """
    ids = [
      c["id"] for c in self._config["components"] if c["props"].get("elem_id") == button
    ]
    (function,) = [
      d["id"]
      for d in self._config["dependencies"]
      if [ids[0], "click"] in d["targets"] and d["backend_fn"]
    ][:1]
    body = {
      "data": data,
      "fn_index": function,
      "session_hash": self._hash,
      "event_data": None,
      "trigger_id": ids[0],
    }
    joined = self._client.post("/gradio_api/queue/join", json=body)
    assert joined.status_code == 200, joined.text
    parameters = {"session_hash": self._hash}
    with self._client.stream(
      "GET", "/gradio_api/queue/data", params=parameters
    ) as stream:
      for line in stream.iter_lines():
        if not line.startswith("data:"):
          continue
        message = json.loads(line[5:])
        yield message
        if message["msg"] in ("process_completed", "close_stream"):
          return

  def draw(self, label: str = "3", seed: int = 0, steps: int = 2) -> bytes:
    """Draws one picture; returns the file of its grid."""
    from gradio_client.utils import apply_diff

    values: list[Any] = []
    outputs: dict[int, Any] = {}  # without those that an update leaves as they are
    for message in self.press("draw-go", [[label], 1, seed, steps, "ddpm", 2.0, 4.0]):
      if message["msg"] == "process_completed":
        assert message["success"], message
      if message["msg"] != "process_generating":
        continue
      data = message["output"]["data"]
      # The first message holds the values, the others changes of the values.
      if values:
        pairs = zip(values, data, strict=True)
        values = [apply_diff(value, change) for value, change in pairs]
      else:
        values = data
      outputs |= {i: v for i, v in enumerate(values) if v != {"__type__": "update"}}
    assert "Done" in outputs[0], outputs[0]
    answer = self._client.get(outputs[1]["url"])
    assert answer.status_code == 200
    return answer.content

  def close(self) -> None:
    self._client.close()


def read_config(demo: Demo) -> dict[str, Any]:
  """The page's config, which names its components and handlers."""
  import httpx

  answer = httpx.get(f"{demo.url}/config", timeout=SECONDS, trust_env=False)
  assert answer.status_code == 200
  return answer.json()
