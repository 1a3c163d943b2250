"""Descriptions of GPUs for XLA's compiler, which then needs no GPU.

The figures are what CUDA reports for these GPUs; those of a100, h100, h200 and b200 are
also in the target descriptions of XLA (openxla/xla, xla/backends/gpu/target_config).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Target:
  """What the compiler asks about a GPU.

  Attributes:
    description: name of the GPU.
    compute_capability: major and minor version.
    cores: number of streaming multiprocessors.
    fpus: float32 units of a multiprocessor.
    threads: largest number of threads of a multiprocessor.
    shared_memory: bytes of a multiprocessor.
    shared_memory_of_block: largest number of bytes of a block.
    l2_cache: bytes.
    memory: bytes.
    bandwidth: bytes per second from and to the memory.
    clock: GHz.
  """

  description: str
  compute_capability: tuple[int, int]
  cores: int
  fpus: int
  threads: int
  shared_memory: int
  shared_memory_of_block: int
  l2_cache: int
  memory: int
  bandwidth: int
  clock: float


_HOPPER = Target(
  description="NVIDIA H100 80GB HBM3",
  compute_capability=(9, 0),
  cores=132,
  fpus=128,
  threads=2048,
  shared_memory=233_472,
  shared_memory_of_block=232_448,
  l2_cache=52_428_800,
  memory=84_942_979_072,
  bandwidth=3_352_320_000_000,
  clock=1.98,
)
_ADA = Target(
  description="NVIDIA GeForce RTX 4090",
  compute_capability=(8, 9),
  cores=128,
  fpus=128,
  threads=1536,
  shared_memory=102_400,
  shared_memory_of_block=101_376,
  l2_cache=75_497_472,
  memory=25_386_352_640,
  bandwidth=1_008_096_000_000,
  clock=2.52,
)
TARGETS = {
  "h100": _HOPPER,
  "h200": dataclasses.replace(
    _HOPPER,
    description="NVIDIA H200 141GB HBM3e",
    memory=151_397_597_184,
    bandwidth=4_800_000_000_000,
  ),
  "b200": dataclasses.replace(
    _HOPPER,
    description="NVIDIA B200",
    compute_capability=(10, 0),
    cores=148,
    l2_cache=132_644_864,
    memory=191_514_411_008,
    bandwidth=7_672_320_000_000,
    clock=1.965,
  ),
  "a100": dataclasses.replace(
    _HOPPER,
    description="NVIDIA A100-SXM4-80GB",
    compute_capability=(8, 0),
    cores=108,
    fpus=64,
    shared_memory=167_936,
    shared_memory_of_block=166_912,
    l2_cache=41_943_040,
    memory=85_100_068_864,
    bandwidth=2_039_040_000_000,
    clock=1.41,
  ),
  "rtx4090": _ADA,
  "rtx4080": dataclasses.replace(
    _ADA,
    description="NVIDIA GeForce RTX 4080",
    cores=76,
    l2_cache=67_108_864,
    memory=16_855_334_912,
    bandwidth=716_864_000_000,
    clock=2.505,
  ),
  "t4": Target(
    description="Tesla T4",
    compute_capability=(7, 5),
    cores=40,
    fpus=64,
    threads=1024,
    shared_memory=65_536,
    shared_memory_of_block=65_536,
    l2_cache=4_194_304,
    memory=15_828_320_256,
    bandwidth=320_064_000_000,
    clock=1.59,
  ),
}


def target_config(target: Target) -> str:
  """Returns a GpuTargetConfigProto of XLA in text format, for CUDA 13 and cuDNN 9."""
  major, minor = target.compute_capability
  # The features that only one generation has, such as its matrix units.
  features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {target.shared_memory_of_block}
  shared_memory_per_core: {target.shared_memory}
  threads_per_core_limit: {target.threads}
  core_count: {target.cores}
  fpus_per_core: {target.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {target.bandwidth}
  l2_cache_size: {target.l2_cache}
  clock_rate_ghz: {target.clock}
  device_memory_size: {target.memory}
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
    feature_extension: {features}
  }}
  device_vendor: "NVIDIA Corporation"
  name: "{target.description}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
runtime_version {{ major: 13 }}
device_description_str: "{target.description}"
"""
