"""Cells of the notebook, and colab/install.py, with git, pip and the hub faked.

tests/test_notebook_runs.py executes the whole notebook.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax.models.registry import init_params
from mdt_jax.sampling.pictures import make_grid
from tests.pretrained.hub_cache import HubCache

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "colab" / "mdt.ipynb"


def notebook():
  return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def source(tag):
  """The text of the cell with a tag."""
  (found,) = [
    cell for cell in notebook()["cells"] if tag in cell["metadata"].get("tags", ())
  ]
  return "".join(found["source"])


def make_repository(folder):
  """Makes what the first cell looks for: a colab/install.py, which notes its run."""
  (folder / "colab").mkdir(parents=True, exist_ok=True)
  (folder / "colab" / "install.py").write_text(
    "from pathlib import Path\nPath('installed').touch()\n"
  )
  return folder


class FirstCell:
  """Runs the first cell in a folder, with git faked."""

  def __init__(self, folder, monkeypatch):
    self.clones = []
    self.fails = False
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", self._run)

  def _run(self, command, **options):
    assert command[:2] == ["git", "clone"]
    self.clones.append(command[-2:])
    if not self.fails:
      make_repository(Path(command[-1]))
    return subprocess.CompletedProcess(command, int(self.fails), "", "fatal: no\n")

  def __call__(self):
    """Runs the cell; returns the folder that it changes into."""
    exec(compile(source("setup"), NOTEBOOK.name, "exec"), {})
    assert Path("installed").exists()
    assert sys.path[0] == os.getcwd()
    return Path.cwd()


@pytest.mark.parametrize("inside", [".", "colab"])
def test_first_cell_inside_a_clone_uses_this_clone(tmp_path, monkeypatch, inside):
  make_repository(tmp_path)
  cell = FirstCell(tmp_path / inside, monkeypatch)
  assert cell() == tmp_path
  assert cell.clones == []


def test_first_cell_elsewhere_clones_the_address_once(tmp_path, monkeypatch):
  cell = FirstCell(tmp_path, monkeypatch)
  for _ in range(2):
    assert cell() == tmp_path / "mdt_jax"
    monkeypatch.chdir(tmp_path)
  ((address, folder),) = cell.clones
  assert f'ADDRESS = "{address}"' in source("setup")
  assert folder == str(tmp_path / "mdt_jax")


def test_failed_clone_says_why_and_what_to_do(tmp_path, monkeypatch):
  cell = FirstCell(tmp_path, monkeypatch)
  cell.fails = True
  with pytest.raises(RuntimeError) as caught:
    cell()
  assert "fatal: no" in str(caught.value) and "Set ADDRESS" in str(caught.value)


@pytest.fixture
def install(monkeypatch):
  """colab/install.py, with pip faked.

  `command` is the command of pip, `constraints` are the lines of its file, `code` is
  its exit code.
  """
  spec = importlib.util.spec_from_file_location("install", ROOT / "colab/install.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  pip = types.SimpleNamespace(command=None, constraints=None, code=0)

  def run(command, **options):
    pip.command = command
    path = Path(command[command.index("--constraint") + 1])
    pip.constraints = path.read_text().splitlines()
    return subprocess.CompletedProcess(command, pip.code, "", "pip says\n")

  monkeypatch.setattr(subprocess, "run", run)
  return types.SimpleNamespace(module=module, pip=pip)


def test_install_pins_what_the_accelerator_needs(install):
  held = ["jax", "jaxlib", "jax-cuda12-pjrt", "jax_cuda12_plugin", "libtpu", "numpy"]
  others = ["jaxtyping", "flax", "absl-py", "numpy-financial"]
  install.module.install({name: "1.0" for name in [*held, *others]})
  assert install.pip.constraints == [f"{name}==1.0" for name in held]
  assert install.pip.command[-2:] == ["--editable", str(ROOT)]


def test_failed_installation_says_what_pip_says(install, capsys):
  install.pip.code = 1
  with pytest.raises(RuntimeError, match="pip"):
    install.module.install({})
  assert "pip says" in capsys.readouterr().out


def test_install_names_each_replaced_version(install, monkeypatch, capsys):
  before = {"absl-py": "1.4.0", "jax": "0.7.2"}
  found = iter([before, {**before, "absl-py": "2.1"}])
  monkeypatch.setattr(install.module, "versions", lambda: next(found))
  install.module.main()
  lines = capsys.readouterr().out.splitlines()
  assert lines[1:-1] == ["absl-py 1.4.0 was replaced by 2.1"]


@pytest.mark.parametrize(
  ("platform", "kind", "start"),
  [
    ("tpu", "TPU v5 lite", "TPU: 2 x TPU v5 lite"),
    ("gpu", "Tesla T4", "GPU: 2 x Tesla T4"),
    ("cpu", "cpu", "CPU: no TPU or GPU was found."),
  ],
)
def test_one_line_names_the_device(install, monkeypatch, platform, kind, start):
  device = types.SimpleNamespace(platform=platform, device_kind=kind)
  monkeypatch.setattr(jax, "devices", lambda: [device] * 2)
  line = install.module.device_line()
  assert line.startswith(start) and "\n" not in line


def run_released(monkeypatch, folder):
  """Runs the last cell as on an accelerator; returns what it displays."""
  monkeypatch.chdir(folder)
  text = source("released")
  as_on_gpu = text.replace('DOWNLOAD = jax.default_backend() != "cpu"', "DOWNLOAD = 1")
  assert as_on_gpu != text
  displayed = []
  names = {
    "Path": Path,
    "Pipeline": mdt_jax.Pipeline,
    "display": displayed.append,
    "jax": jax,
    "make_grid": make_grid,
  }
  exec(compile(as_on_gpu, NOTEBOOK.name, "exec"), names)
  return displayed


@pytest.fixture
def hub(tmp_path, monkeypatch):
  pytest.importorskip("huggingface_hub", reason="comes with the test extra")
  cache = HubCache(tmp_path / "hub")
  cache.use(monkeypatch)
  return cache


def test_unreachable_weights_are_left_out_with_one_sentence(
  hub, tmp_path, monkeypatch, capsys
):
  assert run_released(monkeypatch, tmp_path) == []
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("The released network is left out: ") and "shgao" in line


def test_released_weights_are_converted_and_draw_four_classes(
  hub, tmp_path, monkeypatch
):
  torch = pytest.importorskip("torch", reason="comes with the test extra")
  sizes = dict(input_size=8, in_channels=4, num_classes=1000, depth=4, decode_depth=2)
  attributes = dict(hidden_size=16, num_heads=2, **sizes)
  model = mdt_jax.create_model("MDTv2-S/2", **attributes)
  params = init_params(model, jax.random.key(0))
  tensors = mdt_jax.to_torch({"variant": "MDTv2", **attributes}, params)
  path = tmp_path / "weights.pt"
  torch.save({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, path)
  hub.add("shgao/MDT-XL2", {"mdt_xl2_v2_ckpt.pt": path})
  vae = ROOT / "tests" / "fixtures" / "vae"
  hub.add("stabilityai/sd-vae-ft-ema", {file.name: file for file in vae.iterdir()})
  (grid,) = run_released(monkeypatch, tmp_path)
  assert isinstance(grid, Image.Image) and grid.width > 4 * 64


def test_notebook_asks_for_a_tpu():
  assert notebook()["metadata"]["accelerator"] == "TPU"


def test_text_explains_each_code_cell():
  kinds = [cell["cell_type"] for cell in notebook()["cells"]]
  pairs = list(itertools.pairwise(kinds))
  assert "code" in kinds and ("code", "code") not in pairs and kinds[0] == "markdown"


def test_notebook_is_stored_without_outputs():
  for cell in notebook()["cells"]:
    assert not cell.get("outputs") and cell.get("execution_count") is None
  assert NOTEBOOK.stat().st_size < 20_000
