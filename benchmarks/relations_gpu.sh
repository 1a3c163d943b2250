#!/usr/bin/env bash
# The experiment on relations with 256 tokens on one GPU:
# bash benchmarks/relations_gpu.sh RESULTS
#
# Networks of width 384 with 12 blocks in bfloat16, one seed, largest arm first, at most
# 8 minutes on an H100. Writes RESULTS/relations_256.jsonl; the same command continues
# after a stop. Needs JAX, flax, optax, orbax, ml_collections, jaxtyping, absl and etils,
# no Grain and no TensorFlow.
#
# TINY=1 runs every part at a tenth of its size, to try the script on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

results=${1:?usage: bash benchmarks/relations_gpu.sh RESULTS}
python=${PYTHON:-python3}
condition=256 rate=1e-3 seed=1 limit=$((SECONDS + 480))
[[ ${TINY:-} ]] && condition=256_tiny
mkdir -p "$results"
file=$(realpath "$results")/relations_256.jsonl
arms=$("$python" -c "
from benchmarks.relation_arms import CONDITIONS
print(*CONDITIONS['$condition'].arms)") || exit
failed=()
for arm in $arms; do
  left=$((limit - SECONDS)) start=$SECONDS
  if ((left < 20)) || ! timeout "$left" "$python" -m benchmarks.relations \
    --run="$condition,$arm,$seed,$rate" --folder="$results/states" --results="$file" \
    2>"$results/$arm.err"; then
    failed+=("$arm")
    [[ -f $results/$arm.err ]] && tail -n 3 "$results/$arm.err"
  fi
  echo "$arm took $((SECONDS - start)) s"
done
if ((${#failed[@]})); then
  echo "failed or out of time: ${failed[*]}"
  exit 1
fi
