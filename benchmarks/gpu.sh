#!/usr/bin/env bash
# Measures one GPU: bash benchmarks/gpu.sh RESULTS [CHECKOUT]
#
# Writes tables and measurements (JSON) into the folder RESULTS: attention, training
# steps, tests/test_gpu.py, guided sampling. Steps run with the settings that
# docs/performance.md advises for GPUs; the first network also with the default ones.
# CHECKOUT is a clone of the released code of MDTv2, see benchmarks/reference.py; it is
# timed too. A part that fails or takes too long is named at the end and does not stop
# the others.
#
# TINY=1 runs every part with tiny sizes, to try the script on a CPU. ONLY='tests|sample'
# runs the parts whose names match the pattern.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

results=${1:?usage: bash benchmarks/gpu.sh RESULTS [CHECKOUT]}
checkout=${2:-}
python=${PYTHON:-python3}
mkdir -p "$results"
# The released code needs memory in the same process.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
# The tests compare with the CPU; tests/conftest.py would set flags of CPUs.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} XLA_FLAGS=${XLA_FLAGS:-}
failed=()

# part NAME SECONDS MODULE FLAGS...: runs a benchmark with a limit.
part() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  [[ $name =~ ${ONLY:-.} ]] || return 0
  echo "== $name"
  if ! timeout "$limit" "$python" -m "$@" 2>"$results/$name.err" |
    tee "$results/$name.txt"; then
    failed+=("$name")
    tail -n 3 "$results/$name.err"
  fi
  echo "== $name took $((SECONDS - start)) s"
}

bench() { # bench NAME SECONDS MODULE FLAGS...
  local name=$1 limit=$2 module=$3
  shift 3
  part "$name" "$limit" "benchmarks.$module" --dtype=bfloat16 --repeats="$repeats" \
    --json="$results/$name.json" "$@"
}

if [[ ${TINY:-} ]]; then
  repeats=1 batch=1 pair=1 largest=MDTv2-S/2 models=(MDTv2-S/2) shapes=("4 2 8")
  fast=(--attention_kernel=auto --unroll=-1)
else
  # The last part has 8 images: the released batch of a GPU, and both programs fit.
  repeats=10 batch=32 pair=8 largest=MDTv2-XL/2
  models=(DiT-XL/2 MDTv2-XL/2 MDTv2-S/2 MDTv2-B/2)
  shapes=("16 16 72" "32 16 72")  # tokens along a side, heads, width: XL/2 at 256, 512
fi
fast=(--attention_kernel=auto --unroll=-1)

for shape in "${shapes[@]}"; do
  read -r grid heads width <<<"$shape"
  bench "attention_$grid" 90 attention --batch_size="$batch" --grid="$grid" \
    --kept=$((grid * grid * 5 / 8)) --heads="$heads" --head_dim="$width"
done
for model in "${models[@]}"; do
  bench "train_${model//\//_}" 150 train_step --models="$model" --batch_size="$batch" \
    "${fast[@]}"
done
part tests 180 pytest -q -rs -s -p no:cacheprovider tests/test_gpu.py
bench sample 120 sampling --models="$largest" --batch_size="$batch" "${fast[@]}"
bench train_default 120 train_step --models="${models[0]}" --batch_size="$batch"
if [[ $checkout ]]; then
  # JAX would otherwise keep what it used while it compiled, and PyTorch runs out.
  export XLA_PYTHON_CLIENT_PREALLOCATE=true XLA_PYTHON_CLIENT_MEM_FRACTION=0.5
  for compile in false true; do
    bench "released_compile_$compile" 240 train_step --models="$largest" \
      --batch_size="$pair" --reference="$checkout" --compile_reference="$compile" \
      "${fast[@]}"
  done
fi
if ((${#failed[@]})); then
  echo "failed or too slow: ${failed[*]}"
  exit 1
fi
