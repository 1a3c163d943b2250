"""The manifests of launch/gke: the Kubernetes schema, and consistent values."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
GKE = ROOT / "launch" / "gke"
KUBERNETES = "1.33"
# Fields in the custom resource definition of JobSet v1alpha2 (kubernetes-sigs/jobset).
# kubernetes-validate checks only the job inside it, which is most of a manifest.
SPEC = {"coordinator", "failurePolicy", "network", "replicatedJobs", "successPolicy"}
FAILURE_POLICY = {"maxRestarts", "restartStrategy", "rules"}
RULE = {
  "name",
  "action",
  "onJobFailureReasons",
  "onJobFailureMessagePatterns",
  "targetReplicatedJobs",
}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}


@pytest.fixture(params=["tpu.yaml", "gpu.yaml"])
def jobset(request):
  return yaml.safe_load((GKE / request.param).read_text())


@pytest.fixture
def job(jobset):
  (replicated,) = jobset["spec"]["replicatedJobs"]
  assert replicated.keys() == {"name", "replicas", "template"}
  metadata = {"name": replicated["name"]}
  kind = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata}
  return kind | replicated["template"]


def test_job_is_valid_kubernetes(job):
  kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_validation_finds_a_wrong_field(job):
  wrong = copy.deepcopy(job)
  wrong["spec"]["template"]["spec"]["restartpolicy"] = "Never"
  with pytest.raises(kubernetes_validate.ValidationError, match="restartpolicy"):
    kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_jobset_has_only_fields_of_v1alpha2(jobset):
  assert jobset.keys() == {"apiVersion", "kind", "metadata", "spec"}
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert jobset["kind"] == "JobSet"
  assert jobset["spec"].keys() <= SPEC
  policy = jobset["spec"]["failurePolicy"]
  assert policy.keys() <= FAILURE_POLICY
  for rule in policy["rules"]:
    assert rule.keys() <= RULE
    assert rule["action"] in ACTIONS
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


@pytest.mark.parametrize(
  ("reason", "message", "action"),
  [
    # Messages of the Kubernetes job controller (pod_failure_policy.go).
    (
      "PodFailurePolicy",
      "Container train for pod a/b failed with exit code 2 matching FailJob rule at"
      " index 0",
      "FailJobSet",
    ),
    (
      "PodFailurePolicy",
      "Pod a/b has condition DisruptionTarget matching FailJob rule at index 1",
      "RestartJobSetAndIgnoreMaxRestarts",
    ),
    ("BackoffLimitExceeded", "Job has reached the specified backoff limit", None),
  ],
)
def test_bad_input_is_final_and_preemption_uses_no_restart(
  jobset, reason, message, action
):
  def fits(rule):
    patterns = rule.get("onJobFailureMessagePatterns", [""])
    return reason in rule["onJobFailureReasons"] and any(
      re.search(pattern, message) for pattern in patterns
    )

  rules = jobset["spec"]["failurePolicy"]["rules"]
  found = next((rule["action"] for rule in rules if fits(rule)), None)
  assert found == action


def test_one_failed_process_fails_the_job(job):
  spec = job["spec"]
  assert spec["backoffLimit"] == 0
  assert spec["completionMode"] == "Indexed"
  assert spec["parallelism"] == spec["completions"]
  (container,) = spec["template"]["spec"]["containers"]
  exit_codes, disruption = spec["podFailurePolicy"]["rules"]
  assert exit_codes["onExitCodes"]["containerName"] == container["name"]
  assert exit_codes["onExitCodes"]["values"] == [2]
  assert disruption["onPodConditions"][0]["type"] == "DisruptionTarget"


def test_every_volume_mount_has_a_volume(job):
  pod = job["spec"]["template"]["spec"]
  volumes = {volume["name"] for volume in pod["volumes"]}
  mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
  assert mounts == volumes


def test_gpu_processes_get_their_number_and_coordinator():
  spec = yaml.safe_load((GKE / "gpu.yaml").read_text())["spec"]
  (replicated,) = spec["replicatedJobs"]
  assert spec["coordinator"]["replicatedJob"] == replicated["name"]
  job = replicated["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  values = {entry["name"]: entry.get("value") for entry in container["env"]}
  assert int(values["JAX_NUM_PROCESSES"]) == job["parallelism"] * replicated["replicas"]
  port = int(values["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2])
  assert [entry["containerPort"] for entry in container["ports"]] == [port]
  assert "JAX_PROCESS_ID" in values


def test_tpu_job_has_one_pod_per_host_of_the_slice():
  spec = yaml.safe_load((GKE / "tpu.yaml").read_text())["spec"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
  assert job["parallelism"] * chips == int(rows) * int(columns)


def test_image_includes_files_named_in_pyproject():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  named = {project["readme"], *project["license-files"], "pyproject.toml"}
  kept = (GKE / "Dockerfile.dockerignore").read_text().splitlines()
  assert {f"!{name}" for name in named} <= set(kept)
