#!/usr/bin/env bash
#SBATCH --job-name=text_to_image
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --output=text_to_image/job_%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
# Five minutes before the time limit the run saves a checkpoint and the job queues up again. One of Stable Diffusion
# 1.5's size took 27 s to write (10 GB); a shared disk may take some times as long, and the step under way and a
# validation that has begun are finished first.
#SBATCH --signal=B:USR1@300
#
# From a folder of pictures to new pictures: set-up, captions, fine-tuning, generation.
#
#   bash job.sh          here and now
#   bash job.sh setup    the set-up alone, for a login node whose compute nodes have no internet
#   bash job.sh captions the captions alone, to be read and mended before anything learns from them
#   sbatch job.sh        under Slurm; what stands above is overridden on sbatch's line: sbatch --time=08:00:00 job.sh
#
# Choices come from the environment, for example
#   DATASET=~/pictures MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5 sbatch job.sh
#
#   MODEL           what is fine-tuned: a folder or a hub id (unset: the small starter model of this repository)
#   CAPTIONER       captions the pictures that have no caption: a folder or a hub id (unset: with MODEL
#                   Salesforce/blip-image-captioning-large; else the small starter captioner of this repository, which
#                   knows rendered garments only)
#   DATASET         the folder of pictures, or a hub id (unset: dataset/)
#   EPOCHS          passes over the data set (100)
#   OUTPUT_DIR      where the fine-tuned model goes (unset: a folder in output/ named after data and settings)
#   PROMPT          what to draw (unset: captions of the data set and two short forms of the first)
#   NUM_IMAGES      pictures for each prompt (3)
#   VENV            a Python environment that exists, used as it is (unset: .venv, made here)
#   MODULES         environment modules to load first, where a cluster has them: 'python/3.11 cuda/12.4'
#   TORCH_INDEX_URL where set-up takes PyTorch from, for a cluster whose driver is older than PyPI's build wants:
#                   https://download.pytorch.org/whl/cu126
#   CAPTION_ARGS    further flags for img_captioning.py
#   TRAIN_ARGS      further flags for train_text_to_image.py
#   INFERENCE_ARGS  further flags for inference.py

set -euo pipefail

REAL_MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5
captioner="${CAPTIONER-${MODEL:+Salesforce/blip-image-captioning-large}}" # empty: the starter's

main() {
    case "${1-}" in
        '' | setup | captions) ;;
        *) fail 2 "job.sh takes 'setup', 'captions' or no argument, found '$1'; its choices come from the environment" ;;
    esac
    in_batch && trap hear USR1
    [[ -z "${SLURM_HET_SIZE-}" ]] || fail 2 'a heterogeneous job cannot be used; ask for nodes that are all alike'
    load_modules
    repo="$(find_repository)"
    scripts="$repo/text_to_image"
    use_active_environment
    venv="${VENV:-$repo/.venv}"
    if [[ -z "${VENV-}" ]]; then
        set_up
    elif [[ ! -x "$venv/bin/python" ]]; then
        fail 2 "VENV=$VENV is no Python environment: it has no bin/python"
    else
        check_environment
    fi
    if [[ "${1-}" == setup ]]; then
        fetch
    else
        run_job "${1-}"
    fi
}

say() { printf '%s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

# The folder that holds text_to_image/: the script's own, but for Slurm, which runs a copy from its spool folder.
find_repository() {
    local candidate submitted=''
    if [[ -n "${SLURM_JOB_ID-}" ]] && command -v scontrol >/dev/null; then
        submitted="$({ scontrol show job "$SLURM_JOB_ID" || true; } | sed -n 's|^ *Command=\(.*\)/job\.sh.*|\1|p')"
    fi
    for candidate in "$(dirname "${BASH_SOURCE[0]}")" "$submitted" "${SLURM_SUBMIT_DIR-}" "$PWD"; do
        if [[ -n "$candidate" && -f "$candidate/text_to_image/train_text_to_image.py" ]]; then
            (cd -- "$candidate" >/dev/null && pwd)
            return
        fi
    done
    fail 2 'text_to_image/ is not beside job.sh; submit it from the folder of the repository'
}

# --- set-up ---------------------------------------------------------------------------------------------------------

# .venv/.setup says how far the set-up came: 'unfinished', or the checksum of the requirements that are installed.
set_up() {
    wanted="$(cksum <"$repo/requirements.txt")${TORCH_INDEX_URL:+ $TORCH_INDEX_URL}"
    ! is_complete || return 0
    mkdir -p "$venv"
    # Two jobs may share the folder. Where the file system has no locks the set-up goes on without one.
    exec 9>"$venv/.lock"
    if command -v flock >/dev/null; then
        flock --nonblock 9 || say "another job is setting up $venv: waiting for it"
        flock 9 || true
    fi
    is_complete || install
    exec 9>&-
}

is_complete() {
    # Without TORCH_INDEX_URL any build of PyTorch will do that was installed with one.
    [[ "$(setup_state)" == "$wanted" || (-z "${TORCH_INDEX_URL-}" && "$(setup_state)" == "$wanted "*) ]] &&
        "$venv/bin/python" -c '' 2>/dev/null
}

setup_state() { cat "$venv/.setup" 2>/dev/null || true; }

install() {
    local python started=$SECONDS
    python="$(find_python)"
    if [[ "$(setup_state)" == unfinished ]]; then
        say "the set-up of $venv was interrupted: it begins again"
        # A package that was being unpacked looks installed to pip.
        find "$venv" -mindepth 1 -maxdepth 1 ! -name .setup ! -name .lock -exec rm -rf {} +
    fi
    say "setting up $venv with $("$python" --version): about 6 GB on disk, most of it PyTorch with its CUDA libraries;"
    say 'about 2 minutes on a fast line'
    echo unfinished >"$venv/.setup"
    # An environment that somebody made there is kept and completed.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
    if [[ -n "${TORCH_INDEX_URL-}" ]]; then # the newest build that is there, and everything else as it is pinned
        "$venv/bin/python" -m pip install -qq --disable-pip-version-check --index-url "$TORCH_INDEX_URL" \
            torch torchvision ||
            fail 1 "pip could not install PyTorch from TORCH_INDEX_URL=$TORCH_INDEX_URL (its reason stands above)"
        grep -v '^torch' "$repo/requirements.txt" >"$venv/.requirements"
    else
        cp "$repo/requirements.txt" "$venv/.requirements"
    fi
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --requirement "$venv/.requirements" ||
        fail 1 "pip could not install requirements.txt (its reason stands above); bash job.sh setup tries again"
    printf '%s\n' "$wanted" >"$venv/.setup"
    say "set up in $((SECONDS - started)) s"
}

# The newest Python that the pinned packages run on and that can make an environment.
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

# An environment that is active and has what is needed is used; any other is left alone.
use_active_environment() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX-}}"
    [[ -z "${VENV-}" && -n "$active" && "$active" != "$repo/.venv" && ! -e "$repo/.venv" ]] || return 0
    "$active/bin/python" -c 'import sys; sys.path.insert(0, sys.argv[1]); from runtime import errors; errors.require_packages()' \
        "$scripts" 2>/dev/null || return 0
    VENV="$active"
    say "the active environment is used: $active"
}

load_modules() {
    [[ -n "${MODULES-}" ]] || return 0
    type module >/dev/null 2>&1 || fail 2 "MODULES=$MODULES: this machine has no command 'module'"
    set +u # the function is the cluster's
    # shellcheck disable=SC2086 # several modules are several words
    module load $MODULES || fail 2 "MODULES=$MODULES could not be loaded"
    set -u
}

# An environment that was not made here: is what it needs in it, and does its PyTorch work.
check_environment() {
    "$venv/bin/python" - "$scripts" <<'PYTHON' || exit
import sys

sys.path.insert(0, sys.argv[1])
from runtime.errors import UserError, exit_with, require_packages


def main():
    require_packages()
    try:
        import torch  # noqa: F401
    except Exception as error:
        raise UserError(f"{sys.executable}: its PyTorch does not work: {error}") from None


exit_with(main)
PYTHON
}

# What hub ids name is downloaded now, so that a job without internet finds it; output/.fetched remembers for what.
fetch() {
    local -a caption_args train_args
    [[ -n "${MODEL-}${DATASET-}${CAPTIONER-}${CAPTION_ARGS-}${TRAIN_ARGS-}" ]] || return 0
    read_words CAPTION_ARGS caption_args
    check_caption_args "${caption_args[@]}"
    read_words TRAIN_ARGS train_args
    mkdir -p "$repo/output"
    "$venv/bin/python" - "$scripts" "$captioner" "$repo/output/.fetched" \
        "${#caption_args[@]}" "${caption_args[@]}" --dataset "${DATASET:-$repo/dataset}" \
        ${MODEL:+--pretrained_model_name_or_path "$MODEL"} "${train_args[@]}" <<'PYTHON' || exit
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from runtime.errors import exit_with, require_packages


def main():
    require_packages()
    import img_captioning
    from captioning.caption_file import locate_caption_file, refuse_outside_links, require_pictures_or_rows
    from data.hub_datasets import find_dataset
    from captioning.captioner_loading import download_captioner
    from models.folders import find_bases
    from captioning.sidecars import read_sidecar
    from train_text_to_image import parse_args

    captioner, fetched, count, *words = sys.argv[2:]
    captioning = img_captioning.parse_args(words[: int(count)])
    args = parse_args(words[int(count) :])
    print(f"the model: {find_bases(args)[0]}")
    folder = find_dataset(args)
    captions = locate_caption_file(folder, None, captioning.recursive)
    require_pictures_or_rows(captions)
    refuse_outside_links(captions)
    print(f"the data set: {len(captions.pictures())} pictures in {folder}")
    without = [path for path in captions.without_row(captions.rows()) if not read_sidecar(path)]
    if without and captioner and not Path(captioner).is_dir():
        whole = captioning.allow_pickle or captioning.trust_remote_code
        print(f"the captioner: {download_captioner(captioner, whole)}")
        with open(fetched, "a") as file:
            print(f"captioner {captioner}", file=file)


exit_with(main)
PYTHON
    named >>"$repo/output/.fetched"
}

# All by which a job's training may name something of the hub, on one line.
HUB_FLAGS='pretrained_model_name_or_path|revision|non_ema_revision|variant|cache_dir|dataset|train_data_dir'
HUB_FLAGS+='|dataset_name|dataset_config_name'
named() {
    local word value='' kept=''
    local -a words
    read_words TRAIN_ARGS words
    for word in "${words[@]}"; do
        if [[ -n "$value" || "$word" =~ ^--($HUB_FLAGS)(=|$) ]]; then
            kept+=" $word"
            [[ -z "$value" && "$word" != *=* ]] && value=next || value=''
        fi
    done
    printf '%s|%s|%s\n' "${MODEL-}" "${DATASET-}" "$kept" | tr '\n' ' '
    echo
}

was_fetched() { grep -qsxF "$1" "$repo/output/.fetched"; }

# What captioning is told of the hub: set-up has fetched a captioner only where a picture had no caption then.
captioning_offline() {
    if [[ -z "$went_offline" || -d "$captioner" ]] || was_fetched "captioner $captioner"; then
        echo "${HF_HUB_OFFLINE-}"
    else
        echo 0
    fi
}

# Without a question to the hub where set-up has fetched what this very job names: a compute node may have no internet.
go_offline() {
    if grep -qE -- '(^|[[:space:]])--push_to_hub' <<<"${TRAIN_ARGS-}"; then
        return
    elif was_fetched "$(named)"; then
        export HF_HUB_OFFLINE=1
        went_offline=1
    elif [[ -n "${MODEL-}" && ! -e "$MODEL" ]]; then
        say "$MODEL was not fetched by 'bash job.sh setup' with the same MODEL and DATASET:"
        say 'where compute nodes have no internet, run that on the login node first'
    fi
}

# --- the job --------------------------------------------------------------------------------------------------------

run_job() {
    local precision pictures
    local -a caption_args train_args inference_args captioning training drawing
    read_words CAPTION_ARGS caption_args
    check_caption_args "${caption_args[@]}"
    read_words TRAIN_ARGS train_args
    read_words INFERENCE_ARGS inference_args
    dataset="${DATASET:-$repo/dataset}"
    # In a log file each line appears when it is written, and a progress bar only now and then.
    export PYTHONUNBUFFERED=1
    [[ -t 2 ]] || export TQDM_MININTERVAL=30
    log="$(mktemp)"
    trap 'rm -f "$log" "$log.fifo"' EXIT
    say_start
    ! in_batch || prepare_batch
    precision="$(find_precision)"
    pictures="$(captioned_folder)"
    # The tasks of an array begin together: one captions, the others wait for it.
    captioning=(--image_dir "$pictures" ${captioner:+--model "$captioner"} ${SLURM_ARRAY_TASK_ID:+--wait}
        "${caption_args[@]}")
    training=(--dataset "$dataset" --epochs "${EPOCHS:-100}" ${MODEL:+--pretrained_model_name_or_path "$MODEL"}
        ${output_dir:+--output_dir "$output_dir"} ${precision:+--mixed_precision "$precision"} ${seed:+--seed "$seed"}
        "${train_args[@]}")
    drawing=(--num_images "${NUM_IMAGES:-3}" --resume ${PROMPT:+"--prompt=$PROMPT"}
        ${pictures_dir:+--output_dir "$pictures_dir"} "${inference_args[@]}")
    check_flags "${#captioning[@]}" "${captioning[@]}" "${#training[@]}" "${training[@]}" "${drawing[@]}"

    if [[ -n "$pictures" ]]; then
        HF_HUB_OFFLINE="$(captioning_offline)" step img_captioning "${captioning[@]}"
    fi
    if [[ "$1" == captions ]]; then
        [[ -n "$pictures" ]] || fail 2 "DATASET=$dataset: no folder of pictures, so there are no captions to be written"
        ! in_batch || rm -f "$(state_file)"
        say
        say "== nothing is trained yet: read the captions in $pictures/metadata.jsonl, and mend what is wrong"
        return
    fi
    launch=("${srun[@]}") # training alone runs on all nodes
    step train_text_to_image "${training[@]}"
    launch=()
    # Also a run that was finished before says this.
    model="$(sed -n 's/^the model  *//p' "$log" | tail -n 1)"
    if [[ -z "$model" ]]; then
        say '== a dry run leaves no model to draw with'
        return
    fi
    ! in_batch || check_processes
    step inference --model "$model" "${drawing[@]}"
    say_where
}

# Where pictures may lack a caption, of the folders that training takes: not where parquet files have the captions.
captioned_folder() {
    if [[ -e "$dataset/metadata.jsonl" ]]; then
        echo "$dataset"
    elif [[ -e "$dataset/train/metadata.jsonl" ]]; then
        echo "$dataset/train"
    elif [[ -d "$dataset" && -z "$(find "$dataset/" -name '*.parquet' -print -quit)" ]]; then
        echo "$dataset"
    fi
}

child='' heard='' called_off='' went_offline='' phases='' processes=1 seed='' pictures_dir='' output_dir="${OUTPUT_DIR-}"
srun=() launch=()

# Runs one of the three scripts; its exit code ends the job. What it prints is in $log as well.
step() {
    local script="$1" code=0 began=$SECONDS
    shift
    printf '\n== %s.py\n' "$script"
    if in_batch; then
        [[ -z "$called_off" ]] || requeue
        attend "${launch[@]}" "$venv/bin/python" "$scripts/$script.py" "$@" || code=$?
    else
        "$venv/bin/python" "$scripts/$script.py" "$@" | tee -i "$log" || code=${PIPESTATUS[0]}
    fi
    phases="$phases${phases:+, }$script $((SECONDS - began)) s"
    [[ "$script" == inference && "$code" == 0 ]] || [[ -z "$called_off" ]] || requeue
    if ((code == 75)) && in_batch; then # preempted: Slurm queues the job up again at the end of the time it gives
        say '== stopped by a signal to the run itself: waiting for Slurm to end this job'
        sleep 300
    fi
    ((code == 0)) || exit "$code"
}

# A command in the background: a shell that waits hears signals, and one whose command runs in front of it does not.
attend() {
    local code tee
    rm -f "$log.fifo"
    mkfifo "$log.fifo"
    exec 7<>"$log.fifo" # so that neither end waits for the other
    tee -i "$log" <"$log.fifo" 7>&- &
    tee=$!
    "$@" >&7 2>&1 7>&- &
    child=$!
    exec 7>&-
    [[ -z "$called_off" ]] || kill -USR1 "$child" 2>/dev/null || true
    while :; do
        heard=''
        code=0
        wait "$child" || code=$?
        [[ -n "$heard" ]] || break # else it was the signal that ended the waiting
    done
    child=''
    wait "$tee"
    return "$code"
}

# --- under Slurm ----------------------------------------------------------------------------------------------------

# As a batch script, not in an interactive allocation or a step of one, where nothing is to be queued again.
in_batch() { [[ -n "${SLURM_JOB_ID-}" ]] && grep -aqsF ".batch]" "/proc/$PPID/cmdline"; }

# Slurm sends it some minutes before the time limit.
hear() {
    heard=1
    called_off=1
    [[ -z "$child" ]] || kill -USR1 "$child" 2>/dev/null || true
}

prepare_batch() {
    local nodes="${SLURM_JOB_NUM_NODES:-1}" per_node="${SLURM_GPUS_ON_NODE:-0}" cpus="${SLURM_CPUS_PER_TASK:-1}"
    local restart="${SLURM_RESTART_COUNT:-0}" on_cpu="${ACCELERATE_USE_CPU-}"
    ((restart == 0)) || say "== restart $restart of job $SLURM_JOB_ID; before: $(head -qn 1 "$(state_file)" \
        2>/dev/null || echo 'ended without a word, as when a node dies')"
    if [[ "${on_cpu,,}" =~ ^(1|true|yes|on|y|t)$ ]]; then
        per_node=1
    elif ((per_node > 0)); then
        srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --export=ALL \
            "$venv/bin/python" -c "$CHECK_GPU" "$per_node"
    fi
    ((per_node > 0)) || per_node=1
    processes=$((nodes * per_node))
    cpus=$((cpus / per_node > 0 ? cpus / per_node : 1)) # srun does not inherit it
    srun=(srun "--nodes=$nodes" "--ntasks=$processes" "--ntasks-per-node=$per_node" "--cpus-per-task=$cpus"
        --export=ALL --kill-on-bad-exit=1)
    if ((processes > 1)); then
        MASTER_ADDR="$(scontrol -o show node "$SLURMD_NODENAME" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
        MASTER_PORT=$((20000 + (SLURM_JOB_ID * 13 + restart * 101) % 20000)) # of this start alone
        export MASTER_ADDR MASTER_PORT
        srun+=(bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
            exec "$0" "$@"')
    fi
    if [[ -n "${SLURM_ARRAY_TASK_ID-}" ]]; then # of an array every task has a seed and folders of its own
        seed="$SLURM_ARRAY_TASK_ID"
        output_dir="${OUTPUT_DIR:+$OUTPUT_DIR-$seed}"
        pictures_dir="$repo/Generated_sample/task-$seed"
    fi
    go_offline
}

# Every GPU that was asked for can be used, or the job ends with the reason: on a CPU it would take weeks.
CHECK_GPU='
import sys, warnings

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    try:
        import torch

        for number in range(int(sys.argv[1])):
            torch.zeros(1, device=f"cuda:{number}")
    except Exception as error:
        driver = [str(one.message) for one in said if "driver" in str(one.message)]
        why = (driver or [str(error)])[0].splitlines()[0]
        print(f"error: the job asked for a GPU and PyTorch cannot use it: {why}", file=sys.stderr)
        print("  With a driver that is too old, set up again with TORCH_INDEX_URL (see README).", file=sys.stderr)
        print("  ACCELERATE_USE_CPU=true sbatch job.sh trains on the CPU.", file=sys.stderr)
        sys.exit(1)
'

# That the processes were one run: started wrongly, each would train by itself and say nothing.
check_processes() {
    ! grep -q '^batch ' "$log" || grep -q "\"num_processes\": $processes," "$model/run.json" ||
        fail 1 "$processes processes were started and $model/run.json tells of another number"
}

# Where the job writes down how far it came when it was queued up again.
state_file() { echo "$repo/output/.job_$SLURM_JOB_ID"; }

# The same job again, unless the last three starts got no further.
requeue() {
    local where phase progress times=1 state restart="${SLURM_RESTART_COUNT:-0}"
    # By the array's number all of its tasks would be queued up again, and the last task's own number is the array's.
    local job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
    where="$(sed -n 's/.*stopped after \(step [0-9]* of [0-9]*\).*/after \1/p' "$log" | tail -n 1)"
    phase="${phases##*, }"
    where="${where:-in ${phase%% *}.py}"
    # What captioning, encoding and drawing have done is in files.
    progress="$where, $(find "$repo/output" ${output_dir:+"$output_dir"} "$dataset" \
        "${pictures_dir:-$repo/Generated_sample}" -type f ! -name '.job_*' 2>/dev/null | wc -l || true) files"
    state="$(state_file)"
    mkdir -p "$repo/output"
    if [[ -f "$state" && "$(sed -n 2p "$state")" == "$progress" ]]; then
        times=$(($(tail -n 1 "$state") + 1))
    fi
    ((times <= 3)) || fail 1 "three restarts in a row ended $where: a longer --time is needed"
    printf '%s\n%s\n%s\n' "$where" "$progress" "$times" >"$state"
    say "== $(date '+%F %T') requeued as restart $((restart + 1)) of job $job, $where"
    scontrol requeue "$job" || fail 1 "job $job cannot be requeued; sbatch job.sh goes on from there"
    sleep 600 # until Slurm ends this shell
}

# --- what it says ---------------------------------------------------------------------------------------------------

say_start() {
    local gpus commit
    gpus="$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | paste -sd';' || true)"
    commit="$(git -C "$repo" log -1 --format='%h of %cs' 2>/dev/null || true)"
    say "== $(date '+%F %T') on $(hostname)${SLURM_JOB_ID:+, Slurm job $SLURM_JOB_ID}, $(nproc) CPU cores, GPUs:\
 ${gpus:-none}"
    say "   $("$venv/bin/python" -c '
import importlib.metadata, platform
names = ("torch", "diffusers", "transformers", "accelerate")
versions = (f"{name} {importlib.metadata.version(name)}" for name in names)
print("Python " + platform.python_version(), *versions, sep=", ")
' 2>/dev/null || true); commit ${commit:-unknown}"
}

# What has a variable of its own is no further flag, nor is what must not happen again at each start.
check_caption_args() {
    local word
    for word in "$@"; do
        case "$word" in
            --model | --model=*) fail 2 "CAPTION_ARGS: the captioner is named by CAPTIONER" ;;
            --image_dir | --image_dir=* | --output | --output=*) fail 2 "CAPTION_ARGS: the folder is named by DATASET" ;;
            --existing | --existing=*) fail 2 "CAPTION_ARGS: a job that is started again would replace what you \
have mended; run img_captioning.py --existing replace by hand" ;;
        esac
    done
}

# read_words VARIABLE ARRAY: its words as a shell reads them, quotes included; nothing is expanded or run.
read_words() {
    local -n into="$2"
    local lines
    lines="$(xargs -r printf '%s\n' <<<"${!1-}" 2>/dev/null && echo end)" ||
        fail 2 "$1 has a quote without its partner: ${!1}"
    mapfile -t into <<<"$lines"
    unset 'into[-1]' # `end`, which keeps an empty last word
}

# check_flags COUNT FLAG... COUNT FLAG... FLAG...: captioning's, training's and inference's; a misspelt one is better
# found now than later.
check_flags() {
    "$venv/bin/python" - "$scripts" "$@" <<'PYTHON' || exit
import sys

scripts, *words = sys.argv[1:]
sys.path.insert(0, scripts)
from runtime.errors import exit_with


def counted():
    count = int(words.pop(0))
    flags, words[:count] = words[:count], []
    return flags


def main():
    import img_captioning
    import inference
    import train_text_to_image
    from runtime.flags import given_flags

    img_captioning.parse_args(counted())
    train_text_to_image.parse_args(counted())
    given_flags(inference.build_parser(), words)


exit_with(main)
PYTHON
}

# Mixed precision where a GPU is used and has it. It stands before TRAIN_ARGS, so that what is said there wins.
find_precision() {
    "$venv/bin/python" - "$scripts" <<'PYTHON'
import sys

sys.path.insert(0, sys.argv[1])
from runtime.errors import exit_with, require_packages


def main():
    require_packages()
    from runtime.devices import mixed_precision

    print(mixed_precision() or "")


exit_with(main)
PYTHON
}

say_where() {
    ! in_batch || rm -f "$(state_file)"
    printf '\n== done in %d min %d s: %s\n' "$((SECONDS / 60))" "$((SECONDS % 60))" "$phases"
    tail -n 1 "$log" # inference.py's last line says where the pictures are
    say "the model: $model"
    [[ -z "${MODEL-}" ]] || return 0
    say
    say 'The model that was fine-tuned is the starter of this repository, a small one that was trained on rendered'
    say 'pictures of garments laid flat on white and knows nothing else. A real one is named like this:'
    say "    ${DATASET:+DATASET=$(printf '%q' "$DATASET") }MODEL=$REAL_MODEL sbatch job.sh"
}

main "$@"
