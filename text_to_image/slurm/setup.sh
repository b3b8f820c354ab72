# The Python environment: modules of the cluster, the search for a Python, and what pip installs.
# Sourced by job.sh; uses its say, fail, repo and scripts, and sets `venv`.
# shellcheck shell=bash disable=SC2034,SC2154

load_modules() {
    [[ -n "${MODULES-}" ]] || return 0
    type module >/dev/null 2>&1 || fail 2 "MODULES=$MODULES: this machine has no command 'module'"
    set +u # the function is the cluster's
    # shellcheck disable=SC2086 # several modules are several words
    module load $MODULES || fail 2 "MODULES=$MODULES could not be loaded"
    set -u
}

choose_environment() {
    use_active_environment
    venv="${VENV:-$repo/.venv}"
    if [[ -z "${VENV-}" ]]; then
        set_up
    elif [[ ! -x "$venv/bin/python" ]]; then
        fail 2 "VENV=$VENV is no Python environment: it has no bin/python"
    else
        "$venv/bin/python" "$scripts/slurm/environment.py" torch || exit
    fi
}

# An active environment is used where it has the packages and there is no .venv; otherwise it is left alone.
use_active_environment() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX-}}"
    [[ -z "${VENV-}" && -n "$active" && "$active" != "$repo/.venv" && ! -e "$repo/.venv" ]] || return 0
    "$active/bin/python" "$scripts/slurm/environment.py" packages 2>/dev/null || return 0
    VENV="$active"
    say "the active environment is used: $active"
}

# .venv/.setup holds 'unfinished', or the checksum of the requirements that are installed.
set_up() {
    wanted="$(cksum <"$repo/requirements.txt")${TORCH_INDEX_URL:+ $TORCH_INDEX_URL}"
    ! is_complete || return 0
    { mkdir -p "$venv" && [[ -w "$venv" ]]; } 2>/dev/null || fail 2 "$venv cannot be made or written to; name a Python \
environment that exists, with VENV=FOLDER, or have whoever installed this repository run bash job.sh setup"
    # Two jobs may share the folder. Where the file system has no locks, set-up goes on without one.
    exec 9>"$venv/.lock"
    if command -v flock >/dev/null; then
        flock --nonblock 9 || say "another job is setting up $venv: waiting for it"
        flock 9 || true
    fi
    is_complete || install
    exec 9>&-
}

is_complete() {
    # Without TORCH_INDEX_URL a PyTorch that was installed with one is accepted too.
    [[ "$(setup_state)" == "$wanted" || (-z "${TORCH_INDEX_URL-}" && "$(setup_state)" == "$wanted "*) ]] &&
        "$venv/bin/python" -c '' 2>/dev/null
}

setup_state() { cat "$venv/.setup" 2>/dev/null || true; }

install() {
    local python started=$SECONDS
    python="$(find_python)"
    if [[ "$(setup_state)" == unfinished ]]; then
        say "the set-up of $venv was interrupted: it begins again"
        # pip takes a package that was half unpacked for an installed one.
        find "$venv" -mindepth 1 -maxdepth 1 ! -name .setup ! -name .lock -exec rm -rf {} +
    fi
    say "setting up $venv with $("$python" --version): about 6 GB on disk, most of it PyTorch with its CUDA libraries;"
    say 'about 2 minutes on a fast line'
    echo unfinished >"$venv/.setup"
    # An environment that somebody made there is kept and completed.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
    if [[ -n "${TORCH_INDEX_URL-}" ]]; then # the newest build there, and everything else as it is pinned
        pip_install --index-url "$TORCH_INDEX_URL" torch torchvision ||
            fail 1 "pip could not install PyTorch from TORCH_INDEX_URL=$TORCH_INDEX_URL (see its message above)"
        grep -v '^torch' "$repo/requirements.txt" >"$venv/.requirements"
    else
        cp "$repo/requirements.txt" "$venv/.requirements"
    fi
    pip_install --requirement "$venv/.requirements" ||
        fail 1 'pip could not install requirements.txt (see its message above); bash job.sh setup tries again'
    printf '%s\n' "$wanted" >"$venv/.setup"
    say "set up in $((SECONDS - started)) s"
}

pip_install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

# Prints the newest Python that the pinned packages run on and that can make an environment.
find_python() {
    local name version found='' without_venv=''
    for name in python3.13 python3.12 python3.11 python3 python; do
        # An activated .venv is first on the PATH, and may be half of one.
        [[ "$(command -v "$name")" != "$venv"/* ]] || continue
        version="$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
        found="$found $name ($version)"
        [[ "$version" =~ ^3\.1[123]$ ]] || continue
        if "$name" -c 'import venv, ensurepip' 2>/dev/null; then
            command -v "$name"
            return
        fi
        without_venv="$version"
    done
    [[ -z "$without_venv" ]] || fail 2 "Python $without_venv has no venv module; install it (Debian, Ubuntu: \
apt-get install python$without_venv-venv), or name an environment that exists: VENV=folder bash job.sh"
    fail 2 "Python 3.11, 3.12 or 3.13 is needed, found:${found:- none}; install one (Debian, Ubuntu: apt-get install \
python3 python3-venv; on a cluster: module load python), or name an environment that exists: VENV=folder bash job.sh"
}

describe_machine() {
    local gpus commit
    gpus="$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | paste -sd';' || true)"
    commit="$(git -C "$repo" log -1 --format='%h of %cs' 2>/dev/null || true)"
    say "== $(date '+%F %T') on $(hostname)${SLURM_JOB_ID:+, Slurm job $SLURM_JOB_ID}, $(nproc) CPU cores, GPUs:\
 ${gpus:-none}"
    say "   $("$venv/bin/python" "$scripts/slurm/environment.py" versions || true); commit ${commit:-unknown}"
}
