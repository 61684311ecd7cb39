#!/usr/bin/env bash
# Every check that wants a GPU, in one call; prints one table and leaves the figures of each bench as JSON in OUT.
#   OUT=gpu-figures bash experiments/gpu/run.sh
# Needs torch with CUDA, lightning, hydra-core, omegaconf, tokenizers (and bitsandbytes for its kernels). Works
# from a checkout, installed or not; on a machine without CUDA it runs too, slowly, and says so.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-figures}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

check() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  local start=$SECONDS
  if timeout "$limit" "$PYTHON" -m nanochat.cli "$@" >"$OUT/$name.json" 2>"$OUT/$name.log"; then
    echo "$name ok $((SECONDS - start)) s"
  else
    echo "$name FAILED ($?): $(tail -n 1 "$OUT/$name.log")"
  fi
}

check doctor 120 doctor --json --seconds 3
check loss 90 bench loss --tokens 32768 --dim 768 --json
check step 150 bench step --presets d20,nano-125m --json
check optim 120 bench optim --presets nano-125m --json
check collider 90 bench collider --json
check mtp 90 bench mtp --json
"$PYTHON" experiments/gpu/table.py "$OUT"
