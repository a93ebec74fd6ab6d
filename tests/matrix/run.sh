#!/usr/bin/env bash
# The tests on the oldest and on the newest versions that are supported, each in an environment of its own:
#   tests/matrix/run.sh [lowest|highest]... [-- ARGUMENTS FOR PYTEST]
# A torch for GPUs is several gigabytes; what the package index offers first is taken. Adds a line to tests/survival/matrix.csv.
set -uo pipefail
cd "$(dirname "$0")/../.."
names=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do names+=("$1"); shift; done
[ $# -gt 0 ] && shift
[ ${#names[@]} -gt 0 ] || names=(lowest highest)
table=tests/survival/matrix.csv
[ -f "$table" ] || echo "environment,python,torch,transformers,huggingface_hub,datasets,passed,failed,skipped" > "$table"
status=0
for name in "${names[@]}"; do
    python=.venv-matrix/$name/bin/python
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv ".venv-matrix/$name"
    "$python" -m pip install --quiet --constraint "tests/matrix/$name.txt" setuptools &&
        "$python" -m pip install --quiet --constraint "tests/matrix/$name.txt" --no-build-isolation \
            --editable '.[train,figures,audio,video,export,vectors,dev]' || exit 1
    log=$(mktemp)
    "$python" -m pytest --numprocesses auto "$@" | tee "$log" || status=1
    "$python" tests/matrix/row.py "$name" "$log" >> "$table"
    rm -f "$log"
done
exit $status
