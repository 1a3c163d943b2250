"""colab/mdt.ipynb runs from its first cell to its last with the versions of Colab.

bash launch/colab.sh creates an environment with these versions and runs these tests.
git receives the working tree in place of the address of the project. The network
is smaller, and training and scores have fewer steps; the rest is what a user runs.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdt_jax.sampling.pictures import CAPTION_HEIGHT, MARGIN, MIN_TILE
from tests import fresh_clone
from tests.test_address import ADDRESS

ENVIRONMENT = os.environ.get("COLAB_VENV")
pytestmark = pytest.mark.skipif(
  ENVIRONMENT is None, reason="runs in the environment of bash launch/colab.sh"
)
NOTEBOOK = fresh_clone.ROOT / "colab" / "mdt.ipynb"
STEPS = int(os.environ.get("STEPS", "40"))
SHORTER = f"""
config.model.update(hidden_size=32, num_heads=2, unroll=1)
config.masking.num_lengths = 1
config.sampling.num_steps = 10
config.num_steps = {STEPS}
config.log_every = min(config.log_every, {STEPS} // 2)
config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, {STEPS} // 2)
for group, name in (
  (config, "checkpoint_every"), (config, "sample_every"), (config.eval, "every")
):
  group[name] = min(group[name], {STEPS})
"""
EXECUTE = """
import sys
import nbclient, nbformat
path, folder = sys.argv[1:]
notebook = nbformat.read(path, 4)
client = nbclient.NotebookClient(
  notebook, timeout=1800, resources={"metadata": {"path": folder}}
)
client.execute()
nbformat.write(notebook, path)
"""
VERSIONS = """
import importlib.metadata, json
print(json.dumps({d.name: d.version for d in importlib.metadata.distributions()}))
"""


def python(*arguments, **environment):
  """Runs the interpreter of the environment; returns the standard output."""
  variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  variables["PATH"] = f"{ENVIRONMENT}/bin{os.pathsep}{variables['PATH']}"
  done = subprocess.run(
    [f"{ENVIRONMENT}/bin/python", *map(str, arguments)],
    env=variables | environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


class Executed:
  """The executed notebook.

  Attributes:
    before, after: the versions of all packages, before and after the notebook.
    cells: the code cells, without the one that this test adds.
  """

  def __init__(self, folder: Path):
    repository = fresh_clone.make_repository(folder / "repository")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    at = next(i for i, cell in enumerate(notebook["cells"]) if "settings" in tags(cell))
    fewer = dict(cell_type="code", id="fewer", execution_count=None, outputs=[])
    added = fewer | {"metadata": {}, "source": SHORTER}
    notebook["cells"].insert(at + 1, added)
    path, work = folder / "executed.ipynb", folder / "content"
    work.mkdir()
    path.write_text(json.dumps(notebook))
    self.before = json.loads(python("-c", VERSIONS))
    started = tempfile.mkdtemp(dir=folder)  # TensorBoard notes its process here
    try:
      python(
        "-c",
        EXECUTE,
        path,
        work,
        TMPDIR=started,
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0=f"url.{repository.as_uri()}.insteadOf",
        GIT_CONFIG_VALUE_0=ADDRESS,
      )
    finally:
      for file in Path(started).rglob("pid-*.info"):
        with contextlib.suppress(ProcessLookupError):  # ended with the kernel
          os.kill(json.loads(file.read_text())["pid"], signal.SIGTERM)
    self.after = json.loads(python("-c", VERSIONS))
    cells = json.loads(path.read_text())["cells"]
    self.cells = [c for c in cells if c["cell_type"] == "code" and c["id"] != "fewer"]

  def cell(self, tag):
    (found,) = [cell for cell in self.cells if tag in tags(cell)]
    return found


def tags(cell):
  return cell["metadata"].get("tags", [])


def printed(cell, *names):
  """The lines that a cell printed, to the streams of these names or to all."""
  streams = [x for x in cell["outputs"] if x["output_type"] == "stream"]
  streams = [x for x in streams if not names or x["name"] in names]
  return "".join("".join(x["text"]) for x in streams).splitlines()


def shown(cell, kind):
  """What a cell displayed as a MIME type."""
  data = [x.get("data", {}) for x in cell["outputs"]]
  return ["".join(each[kind]) for each in data if kind in each]


def pictures(cell):
  return [
    Image.open(io.BytesIO(base64.b64decode(text))) for text in shown(cell, "image/png")
  ]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
  return Executed(tmp_path_factory.mktemp("colab"))


def test_every_version_of_colab_stays(executed):
  kept = {name: executed.after.get(name) for name in executed.before}
  del kept["pip"]
  assert kept.items() <= executed.before.items()


def test_first_cell_clones_the_address_and_warns_of_a_cpu(executed):
  *_, last = printed(executed.cell("setup"))
  assert last.startswith("CPU: no TPU or GPU was found.")


def test_training_shows_few_lines(executed):
  lines = printed(executed.cell("train"))
  assert any(line.startswith(f"step {STEPS}/{STEPS} ") for line in lines), lines
  assert len(lines) <= 25, lines


def test_no_cell_warns(executed):
  for cell in executed.cells:
    errors = [line for line in printed(cell, "stderr") if line.strip()]
    assert [line for line in errors if not line.endswith("image/s]")] == []  # bars


def test_tensorboard_is_inline(executed):
  (frame,) = shown(executed.cell("tensorboard"), "text/html")
  assert "<iframe" in frame


def test_every_picture_is_inline(executed):
  found = [pictures(cell) for cell in executed.cells if "picture" in tags(cell)]
  assert [len(each) for each in found] == [1] * 5
  for (picture,) in found:
    assert np.asarray(picture.convert("L")).std() > 10


def test_inpainting_changes_the_hidden_half_alone(executed):
  (picture,) = pictures(executed.cell("inpaint"))
  row = np.asarray(picture.convert("L"))[CAPTION_HEIGHT:][:MIN_TILE]
  tiles = [row[:, MARGIN + i * (MIN_TILE + MARGIN) :][:, :MIN_TILE] for i in range(6)]
  half = MIN_TILE // 2
  for tile in tiles[2:]:
    np.testing.assert_array_equal(tile[:half], tiles[0][:half])
    assert (tile[half:] != tiles[0][half:]).mean() > 0.2


def test_scores_are_shown(executed):
  (text,) = shown(executed.cell("scores"), "text/plain")
  assert all(name in text for name in ("frechet", "accuracy", "diversity"))


def test_released_network_is_left_out_with_one_sentence_on_a_cpu(executed):
  (line,) = printed(executed.cell("released"))
  assert line.endswith("it needs a TPU or a GPU.")
