"""The commands and links of docs/launch.md."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "launch.md"


def blocks(language="shell"):
  text = re.sub(r"\n +```", "\n```", DOC.read_text())  # a block inside a list
  return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(program):
  """Returns the commands that start with the program, to the end of their blocks."""
  found = [
    block[match.start() :]
    for block in blocks()
    for match in re.finditer(rf"^ *{re.escape(program)} ", block, re.MULTILINE)
  ]
  assert found
  return found


def anchors(page):
  """Returns the anchors that GitHub gives to the headings of a page."""
  headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
  kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
  return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("command", commands("launch/tpu_pod.sh"))
def test_tpu_command_has_a_dry_run(command):
  dry = command.strip().replace(
    "launch/tpu_pod.sh all", "launch/tpu_pod.sh all --dry-run"
  )
  assert dry != command.strip()
  result = subprocess.run(["bash", "-c", dry], cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  first, *_, last = result.stdout.splitlines()
  assert first.startswith("gcloud compute tpus queued-resources create ")
  assert last.startswith("gcloud compute tpus queued-resources delete ")


def manifests():
  for command in commands("sed"):
    edit, separator, _ = command.partition("| kubectl")
    assert separator
    text = subprocess.check_output(["bash", "-c", edit], cwd=ROOT, text=True)
    yield yaml.safe_load(text)


def test_manifests_are_edited_by_the_commands():
  for manifest in manifests():
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert spec["containers"][0]["image"] == "…"
    (bucket,) = [volume["csi"] for volume in spec["volumes"] if "csi" in volume]
    assert bucket["volumeAttributes"]["bucketName"] == "…"


def test_several_slices_are_replicas_of_a_job():
  replicas = [
    manifest["spec"]["replicatedJobs"][0]["replicas"] for manifest in manifests()
  ]
  assert replicas == [1, 2]


def test_links_lead_to_pages_and_headings():
  links = re.findall(r"\]\(((?!https?:)[^)]+)\)", DOC.read_text())
  assert links
  for link in links:
    name, _, anchor = link.partition("#")
    page = DOC.parent / name if name else DOC
    assert page.exists(), link
    assert not anchor or anchor in anchors(page), link
