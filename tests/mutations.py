"""Plants one fault at a time in a copy of the package; a test must fail each time.

python -m tests.mutations [NAME …]

Prints the first test that fails for each fault, or MISSED. The exit code is the number
of missed faults. The tests must pass without a fault.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Fault:
  """A fault in `file`, where `right` becomes `wrong`, and the tests to run."""

  file: str
  right: str
  wrong: str
  tests: str


STEP = "training/test_step.py"
FAULTS = {
  "averages swap their shares": Fault(
    "training/step.py", "return 1 - decay**ema_every\n", "return decay\n", STEP
  ),
  "every loss counts at the first time": Fault(
    "training/step.py",
    "bins[:, None] == jnp.arange(count)",
    "0 * bins[:, None] == jnp.arange(count)",
    "training/test_loss_by_time.py",
  ),
  "a strip shows the next prediction": Fault(
    "diffusion/predictions.py",
    "np.arange(len(calls))",
    "np.arange(len(calls))[::-1]",
    "training/test_sample_pictures.py",
  ),
  "accumulated gradients are a sum": Fault(
    "training/step.py", "lambda g: g / accumulation_steps", "lambda g: g", STEP
  ),
  "every step draws the same": Fault(
    "training/step.py",
    "step_key(seed, state.step)",
    "step_key(seed, 0)",
    "test_pinned.py",
  ),
  "the mask removes the kept tokens": Fault(
    "models/masking.py", ">= num_keep", "< num_keep", "models"
  ),
  "kept tokens return in the encoder's order": Fault(
    "models/masking.py", "jnp.argsort(order, axis=1)", "order", "models"
  ),
  "removed tokens leave a route as zeros": Fault(
    "models/tread.py",
    "jnp.where(token_mask.removed[..., None], before, restored)",
    "restored",
    "models/test_tread.py",
  ),
  "the route ends one block early": Fault(
    "models/tread.py",
    "range(self.route_start, end + 1)",
    "range(self.route_start, end)",
    "models/test_tread.py",
  ),
  "the mixer of a MicroDiT changes nothing": Fault(
    "models/microdit.py",
    "tokens, _ = mixer(tokens, c, None, None)",
    "mixer(tokens, c, None, None)",
    "models/test_microdit.py",
  ),
  "the output of removed tokens is that of others": Fault(
    "models/blocks.py",
    "x = restore_tokens(x, jnp.zeros(x.shape[-1]), token_mask)",
    "x = x[:, token_mask.ids_restore[0] % x.shape[1]]",
    "models/test_microdit.py",
  ),
  "removed tokens count in the loss of a MicroDiT": Fault(
    "objectives/microdit.py",
    "mean_over(~mask.removed",
    "mean_over(mask.removed | True",
    "objectives/test_microdit.py",
  ),
  "positions of kept tokens are those of the first tokens": Fault(
    "models/sprint.py",
    "look_up(places[0], token_mask.ids_keep)",
    "places[:, : kept.shape[1]]",
    "models/test_sprint.py",
  ),
  "rows and columns of rotations swap": Fault(
    "models/sprint.py",
    "[by_row, by_column]",
    "[by_column, by_row]",
    "models/test_sprint.py",
  ),
  "a group keeps the smallest draws": Fault(
    "models/sprint.py",
    "jnp.argsort(-grouped(noise), axis=-1)",
    "jnp.argsort(grouped(noise), axis=-1)",
    "models/test_sprint.py",
  ),
  "no path is dropped": Fault(
    "objectives/sprint.py",
    "path_drop=draws.path_drop",
    "path_drop=None",
    "objectives/test_sprint.py",
  ),
  "MaskDiT trains the removed tokens to denoise": Fault(
    "objectives/maskdit.py",
    "mean_over(~mask.removed",
    "mean_over(mask.removed",
    "objectives/test_maskdit.py",
  ),
  "a patch of MaskDiT's target has its biased variance": Fault(
    "objectives/maskdit.py", "ddof=1, ", "", "objectives/test_maskdit.py"
  ),
  "MaskDiT's decoder has the heads of the encoder": Fault(
    "models/maskdit.py",
    "num_heads=self.decoder_num_heads",
    "num_heads=self.num_heads",
    "models/test_maskdit.py",
  ),
  "the null label of MaskDiT is the last class": Fault(
    "models/embeddings.py",
    "jnp.zeros_like(table[:1])",
    "table[-1:]",
    "models/test_maskdit.py",
  ),
  "the variance of ddpm is that of the next step": Fault(
    "diffusion/gaussian.py", "fraction * high", "fraction * low", "diffusion"
  ),
  "dpm++ extrapolates half as far": Fault(
    "diffusion/solvers.py", "h[:-1], 1) / 2", "h[:-1], 1) / 4", "diffusion"
  ),
  "the network of a flow receives the time of SD3": Fault(
    "diffusion/flow.py",
    "return 1 - t if self.data_time == 1 else t",
    "return t if self.data_time == 1 else 1 - t",
    "diffusion/test_flow.py",
  ),
  "the shift moves times towards data": Fault(
    "diffusion/flow.py",
    "shift * t / (1 + (shift - 1) * t)",
    "t / (shift + (1 - shift) * t)",
    "diffusion/test_flow.py",
  ),
  "the drift of the SDE has half of the score": Fault(
    "diffusion/stochastic.py",
    "arguments.rate(process, t) * at.score",
    "arguments.rate(process, t) * at.score / 2",
    "diffusion/test_continuous.py",
  ),
  "churn adds no noise": Fault(
    "diffusion/stochastic.py",
    'y += row["noise"]',
    'y += 0 * row["noise"]',
    "diffusion/test_edm.py",
  ),
  "a stage of Runge-Kutta uses the first slope": Fault(
    "diffusion/runge_kutta.py",
    'k.at[row["stage"]]',
    "k.at[0]",
    "diffusion/test_continuous.py",
  ),
  "the likelihood leaves out the volume": Fault(
    "diffusion/likelihood.py",
    "prior + divergence",
    "prior",
    "diffusion/test_continuous.py",
  ),
  "guidance moves away from the condition": Fault(
    "diffusion/guidance.py",
    "base + scale[:, None, None, None] *",
    "base - scale[:, None, None, None] *",
    "diffusion",
  ),
  "damaged bytes pass for whole": Fault(
    "checkpoints/checksums.py",
    "checksum = zlib.crc32(chunk, checksum)",
    "checksum = zlib.crc32(b'', checksum)",
    "checkpoints faults/test_damage.py",
  ),
  "the averages that are saved are the parameters": Fault(
    "checkpoints/manager.py",
    "ema=ocp.args.PyTreeSave(state.ema)",
    "ema=ocp.args.PyTreeSave({k: state.params for k in state.ema})",
    "checkpoints test_pinned.py",
  ),
}


def first_failure(fault: Fault) -> str | None:
  """The first test that fails with a fault."""
  with tempfile.TemporaryDirectory(prefix="mutation_") as folder:
    for name in ("mdt_jax", "tests"):
      shutil.copytree(ROOT / name, Path(folder, name))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = Path(folder, "mdt_jax", fault.file)
    path.write_text(path.read_text().replace(fault.right, fault.wrong))
    tests = [f"tests/{name}" for name in fault.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
      [*command, *tests], cwd=folder, capture_output=True, text=True
    )
  # A test or its fixture; not a file that cannot be collected.
  failed = re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", done.stdout, re.MULTILINE)
  assert failed or done.returncode == 0, done.stdout + done.stderr
  return failed[1] if failed else None


def main() -> None:
  missed = 0
  for name in sys.argv[1:] or FAULTS:
    failed = first_failure(FAULTS[name])
    missed += failed is None
    print(f"{name}: {failed or 'MISSED'}", flush=True)
  sys.exit(missed)


if __name__ == "__main__":
  main()
