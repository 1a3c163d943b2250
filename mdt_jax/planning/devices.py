"""Devices that this machine does not have, for XLA's compilers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from mdt_jax.chips import GPUS_OF_A_HOST, Topology
from mdt_jax.errors import SettingError, one_line
from mdt_jax.gpus import TARGETS, target_config


def open_devices(topology: Topology) -> list[Any]:
  """Returns the devices of a topology; TPUs and GPUs can be compiled for, but not run.

  Call this before JAX starts its devices. A TPU or GPU of this machine stays free.

  Raises:
    SettingError: the compiler is not installed or rejects the topology, or JAX has
      started with too few simulated devices.
  """
  if topology.kind == "cpu":
    return _open_cpus(topology)
  return _open_gpus(topology) if topology.kind in TARGETS else _open_tpus(topology)


def compiler_options(topology: Topology) -> dict[str, Any]:
  """Returns the options of the compiler for a topology."""
  if topology.kind in TARGETS:
    # XLA would time kernels on a GPU. Without times, it finds no tiles for some of its
    # own kernels of products; those of cuBLAS need none.
    return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
  return {}


def _open_cpus(topology: Topology) -> list[Any]:
  """Returns simulated devices."""
  jax.config.update("jax_platforms", "cpu")
  with contextlib.suppress(RuntimeError):  # JAX has started.
    jax.config.update("jax_num_cpu_devices", topology.num_devices)
  if jax.device_count() < topology.num_devices:
    raise SettingError(
      "--topology",
      topology.name,
      f"JAX has already started with {jax.device_count()} devices",
    )
  return jax.devices()[: topology.num_devices]


def _open_tpus(topology: Topology) -> list[Any]:
  """Returns the chips of a TPU slice."""
  jax.config.update("jax_platforms", "cpu")
  # These variables keep libtpu from asking the network for a TPU, which logs warnings.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  # The two cores of a v4 chip are one device, as on a real v4 chip.
  options: dict[str, Any] = {"num_slices": topology.slices}
  if topology.kind == "v4":
    options["chip_config_name"] = "megacore"
  try:
    found = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    return list(found.devices)
  except RuntimeError as error:
    raise _unusable(topology, "TPU", one_line(error), "tpu") from None


def _open_gpus(topology: Topology) -> list[Any]:
  """Returns GPUs, on hosts of up to 8."""
  plugins = importlib.util.find_spec("jax_plugins")
  if plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
    raise _unusable(topology, "GPU", "jax-cuda13-plugin is not installed", "cuda")
  # The plugin would look for a driver, and fail without one.
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
  jax.config.update("jax_platforms", "cpu,cuda")
  count = topology.num_devices
  hosts = -(-count // GPUS_OF_A_HOST)
  try:
    found = topologies.get_topology_desc(
      topology.kind,
      platform="cuda",
      target_config=target_config(TARGETS[topology.kind]),
      topology=f"1x{hosts}x{count // hosts}",  # slices, hosts, GPUs of a host
    )
    return list(found.devices)
  except RuntimeError as error:
    raise _unusable(topology, "GPU", one_line(error), "cuda") from None


def _unusable(topology: Topology, kind: str, reason: str, extra: str) -> SettingError:
  """Returns the error for a compiler that is not installed or fails."""
  return SettingError(
    "--topology",
    topology.name,
    f"the {kind} compiler cannot be used: {reason}; install the compiler with "
    f"pip install -e '.[{extra}]'",
  )
