#!/usr/bin/env bash
# make release-check [TEST=test-fast]: what is committed, as a user would get it. A wheel is built and installed into an empty
# environment; `make demo` runs beside no sources but the wheel's, then `make test` with the wheel as the package.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

git -C "$(dirname "$0")/.." archive HEAD | tar -x -C "$folder"
cd "$folder"
unset PYTHONPATH VIRTUAL_ENV

say "wheel"
"$python" -m venv .venv
.venv/bin/pip wheel --quiet --no-deps --wheel-dir wheels .
rm -rf build ./*.egg-info
wheel=$(echo wheels/*.whl)

say "$wheel into an empty environment"
.venv/bin/pip install --quiet --constraint constraints.txt torch
.venv/bin/pip install --quiet --constraint constraints.txt "$wheel[workflow,cluster,tensorrt-rtx,mpi,lm-eval,test]"
touch .venv/installed
mv trtbuild sources
.venv/bin/python -c 'import trtbuild; assert "site-packages" in trtbuild.__file__, trtbuild.__file__'

say "make demo"
make demo
mv sources trtbuild

say "make ${TEST:-test}"
make "${TEST:-test}"
say "passed"
