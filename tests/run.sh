#!/usr/bin/env bash
# Sets up what the tests need and runs them. Installs no system packages: tests that need some are skipped and say why.
#
#   bash tests/run.sh               the quick tests: all that are not marked slow, slurm or multiprocess
#   bash tests/run.sh --all         every test
#   bash tests/run.sh --set-up      runs nothing
#   bash tests/run.sh -k captions   further arguments go to pytest
#
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

choice=(-m 'not slow and not slurm and not multiprocess')
case "${1-}" in
    --set-up) exit ;;
    --all) choice=() && shift ;;
esac
# One worker a core (each takes 1 GB), with one thread: tiny models are slower on many. The tests of a file stay together
# (they share fixtures), the files in the order that tests/conftest.py gives.
PYTEST_XDIST_AUTO_NUM_WORKERS="$(env -u OMP_NUM_THREADS nproc)"
export PYTEST_XDIST_AUTO_NUM_WORKERS OMP_NUM_THREADS=1
exec "$venv/bin/python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
    "${choice[@]}" "$@"
