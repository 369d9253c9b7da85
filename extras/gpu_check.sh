#!/usr/bin/env bash
# What only a GPU can show, in five minutes and without a network: the CUDA tests, the default job,
# and the benchmark at four shapes with random weights.
#
#     bash extras/gpu_check.sh                                # writes gpu_check.json, gpu_check.md
#     DEVICE=cpu SHAPES=toy bash extras/gpu_check.sh          # a dry run of this script
#
# Settings, all environment variables: PYTHON (python), SHAPES (see bench.py), PARTS, REPEATS (3),
# OUT (a directory; .). Exit status 1: something failed; what was measured is written all the same.

PYTHON=$(command -v "${PYTHON:-python}")
DEVICE=${DEVICE:-cuda}
SHAPES=${SHAPES:-built-in,25m,135m,0.6b}
PARTS=${PARTS:-rollout,step,search,default,loss}
OUT=$(realpath "${OUT:-.}")
ROOT=$(realpath "$(dirname "$0")/..")
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$SCRATCH/datasets TQDM_DISABLE=1 PYTHONPATH=$ROOT
failed=0

cd "$ROOT" || exit 1
timeout 100 "$PYTHON" -m pytest -q -k "cuda or gpu" -p no:cacheprovider >"$SCRATCH/tests" 2>&1
status=$?
[ $status = 0 ] || failed=1
cat "$SCRATCH/tests"
summary=$(tail -n 1 "$SCRATCH/tests" | tr -d '\\"')

cd "$SCRATCH" || exit 1                                       # bench.json is written here
timeout 300 "$PYTHON" -m extras.bench --device "$DEVICE" --shapes "$SHAPES" --only "$PARTS" \
    --repeats "${REPEATS:-3}" | tee table
[ "${PIPESTATUS[0]}" = 0 ] || failed=1

{
    echo "{\"tests\": {\"status\": $status, \"summary\": \"$summary\"}, \"seconds\": $SECONDS,"
    echo "\"bench\": $(cat bench.json 2>/dev/null || echo null)}"
} >"$OUT/gpu_check.json"
{
    cat table
    echo
    echo "The tests for a GPU: $summary. $SECONDS seconds in all."
} >"$OUT/gpu_check.md"
exit $failed
