#!/usr/bin/env bash
# Sets up what the tests need and runs them; further arguments go to pytest: bash tests/run.sh -k captions
# VENV=folder uses an environment that exists, as it is.

set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
env -u VIRTUAL_ENV -u CONDA_PREFIX bash job.sh setup
venv="${VENV:-$PWD/.venv}"
if [[ -z "${VENV-}" ]]; then
    wanted="$(cksum <tests/requirements.txt)"
    if [[ "$(cat "$venv/.setup_tests" 2>/dev/null)" != "$wanted" ]]; then
        "$venv/bin/python" -m pip install -qq --disable-pip-version-check --requirement tests/requirements.txt
        printf '%s\n' "$wanted" >"$venv/.setup_tests"
    fi
fi
exec "$venv/bin/python" -m pytest "$@"
