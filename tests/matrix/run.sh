#!/usr/bin/env bash
# Runs the tests with the oldest and with the newest versions that are supported, each in its own virtual environment:
#   tests/matrix/run.sh [lowest|highest]... [-- ARGUMENTS FOR PYTEST]
# TORCH=2.13.0+cpu installs that torch in both, where the default is a build for GPUs of several gigabytes.
# WORKERS (auto) is the number of pytest-xdist's workers. Adds a line to tests/survival/matrix.csv.
set -uo pipefail
cd "$(dirname "$0")/../.."
names=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do names+=("$1"); shift; done
[ $# -gt 0 ] && shift
[ ${#names[@]} -gt 0 ] || names=(lowest highest)
table=tests/survival/matrix.csv
[ -f "$table" ] || echo "environment,tests,python,torch,transformers,huggingface_hub,datasets,passed,failed,skipped,unfinished" > "$table"
status=0
for name in "${names[@]}"; do
    python=.venv-matrix/$name/bin/python
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv ".venv-matrix/$name"
    versions=$(mktemp)
    sed "${TORCH:+s/^torch==.*/torch==$TORCH/}" "tests/matrix/$name.txt" > "$versions"
    # A new environment's own setuptools is too old for our pyproject.toml.
    "$python" -m pip install --quiet --upgrade 'setuptools>=77' &&
        "$python" -m pip install --quiet --constraint "$versions" --no-build-isolation \
            --editable '.[train,figures,audio,video,export,vectors,dev]' || exit 1
    log=$(mktemp)
    "$python" -m pytest --verbose --numprocesses "${WORKERS:-auto}" "$@" | tee "$log" || status=1
    "$python" tests/matrix/row.py "$name" "${*:-all}" "$log" >> "$table"
    rm -f "$log" "$versions"
done
exit $status
