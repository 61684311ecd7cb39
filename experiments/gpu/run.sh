#!/usr/bin/env bash
# Every check that wants a GPU, in one call of at most nine minutes: prints one dated Markdown page, leaves the figures
# of each check as JSON in OUT, and exits with 1 when a check or a cell of the matrix failed.
#   OUT=gpu-figures bash experiments/gpu/run.sh
#   TINY=1 ... takes a network that any machine trains in no time, and the matrix alone: a test of this script
# Needs torch with CUDA, lightning, hydra-core, omegaconf, tokenizers (and bitsandbytes for its kernels). Works
# from a checkout, installed or not; on a machine without CUDA it runs too, slowly, and says so.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-figures}
mkdir -p "$OUT"
rm -f "$OUT"/*.json # of an earlier call
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0

check() { # name, seconds, command...
  local name=$1 limit=$2 code
  shift 2
  local start=$SECONDS
  timeout -k 5 "$limit" "$PYTHON" -m nanochat.cli "$@" >"$OUT/$name.json" 2>"$OUT/$name.log"
  code=$?
  if [ "$code" = 0 ]; then
    echo "$name ok $((SECONDS - start)) s" >&2
  else
    failed=1
    echo "$name FAILED ($code): $(tail -n 1 "$OUT/$name.log")" >&2
  fi
}

if [ -z "${TINY:-}" ]; then
  check doctor 40 doctor --json --seconds 3
  check loss 30 bench loss --tokens 32768 --dim 768 --json
  check collider 45 bench collider --json
  check mtp 45 bench mtp --json
  check optim 45 bench optim --presets nano-125m --json
fi
"$PYTHON" experiments/gpu/matrix.py "$OUT/matrix.json" --limit "${LIMIT:-75}" --seconds "${MATRIX_SECONDS:-$((535 - SECONDS))}" \
  2>"$OUT/matrix.log" || failed=1
tail -n 1 "$OUT/matrix.log" >&2
"$PYTHON" experiments/gpu/table.py "$OUT" || failed=1
exit "$failed"
