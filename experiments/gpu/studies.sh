#!/usr/bin/env bash
# The studies on a GPU with nano-125m (127M parameters) in place of the small models, one study a call:
#   OUT=gpu-studies bash experiments/gpu/studies.sh optimizers|mtp|collider|mhc [options of study.py]
# A call that is stopped goes on where it stopped: finished runs in OUT are not trained again. Environment:
#   BASE   overrides of every run  (experiment=nano-125m, compiled, on the standard library's text)
#   STEPS  of the equal-steps runs (600 x 16,384 tokens)
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-gpu-studies}")
STEPS=${STEPS:-600}
BASE=${BASE:-experiment=nano-125m model.vocab_size=8192 schedule.warmup_steps=60 data.batch_size=32 trainer.accumulate_grad_batches=1}
study=${1:?optimizers, mtp, collider or mhc}
shift
script=$(ls experiments/*-"$study"/study.py)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# shellcheck disable=SC2086  # BASE is a list of words
exec "$PYTHON" "$script" --out "$OUT/$study" --jobs 1 --steps "$STEPS" "$@" --base $BASE
