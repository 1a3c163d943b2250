#!/usr/bin/env bash
# Trains a small MDTv2 on handwritten digits, draws digits and scores them. This takes
# minutes on two cores. Run the script again to resume from the last checkpoint.
# WORKDIR: folder of the results (default: runs/digits)
set -euo pipefail
source "$(dirname "$0")/common.sh"
WORKDIR="${WORKDIR:-runs/digits}"

echo "installing into $VENV, which takes minutes the first time"
install
python="$VENV/bin/python"
"$python" -m mdt_jax.main --config=configs/digits.py --workdir="$WORKDIR"
"$python" -m mdt_jax.sample --checkpoint="$WORKDIR" --num_images=500 --batch_size=250 \
  --overwrite
"$python" -m mdt_jax.evaluate --checkpoint="$WORKDIR" \
  --samples="$WORKDIR/samples/samples.npz"

cat <<EOF

picture:      $WORKDIR/samples/samples.png
scores:       $WORKDIR/evaluation/scores.json
checkpoint:   $WORKDIR/checkpoints
TensorBoard:  $VENV/bin/tensorboard --logdir=$WORKDIR/tensorboard
next:         source $VENV/bin/activate, then the commands of README.md
EOF
