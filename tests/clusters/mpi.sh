#!/usr/bin/env bash
# Ranks started by OpenMPI's mpirun are found: `tests/clusters/mpi.sh [python]`. Needs openmpi-bin (apt-get install).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${1:-python}
command -v mpirun >/dev/null || { echo "skipped: mpirun is not installed (apt-get install openmpi-bin)"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mpirun --allow-run-as-root --oversubscribe -n 2 "$python" "$here/train.py" --folder "$folder/mpi" | tee "$folder/log"
[ "$(grep -c '^rank [01] of 2: step 20, weights' "$folder/log")" = 2 ] || { echo "FAILED: two ranks did not finish"; exit 1; }
[ "$(sed -n 's/.*weights //p' "$folder/log" | sort -u | wc -l)" = 1 ] || { echo "FAILED: the ranks' weights differ"; exit 1; }
echo "ok: two ranks under mpirun"
