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
# Five minutes before the time limit the run saves a checkpoint and the job queues up again. A checkpoint of Stable
# Diffusion 1.5's size took 27 s to write (10 GB); a shared disk may take several times as long, and the step under
# way and a validation that has begun are finished first.
#SBATCH --signal=B:USR1@300
#
# From a folder of pictures to new pictures: set-up, captions, fine-tuning, generation.
#
#   bash job.sh           here and now
#   bash job.sh setup     the set-up alone, for a login node whose compute nodes have no internet
#   bash job.sh captions  the captions alone, to be read and corrected before anything learns from them
#   sbatch job.sh         under Slurm; the options above are overridden on its line: sbatch --time=08:00:00 job.sh
#
# Choices come from the environment, for example
#   DATASET=~/pictures MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5 sbatch job.sh
#
#   MODEL           what is fine-tuned: a folder, a hub id or one .safetensors file (unset: this repository's starter)
#   CAPTIONER       captions the pictures that have no caption: a folder or a hub id (unset: the small starter
#                   captioner, for rendered garments only; with MODEL Salesforce/blip-image-captioning-large)
#   DATASET         the folder of pictures, 'shards/*.tar' or a hub id; several as A:B (unset: dataset/)
#   METADATA_FILE   the file of the captions, where they cannot be in DATASET (unset: metadata.jsonl in DATASET)
#   EPOCHS          passes over the data set (unset: the number of samples that the model recommends, else 100)
#   OUTPUT_DIR      where the fine-tuned model goes (unset: a folder in output/ named after data and settings)
#   PICTURES_DIR    where the generated pictures go (unset: Generated_sample/)
#   PROMPT          what to generate (unset: captions of the data set and two short forms of the first)
#   NUM_IMAGES      pictures for each prompt (3)
#   VENV            a Python environment that exists, used as it is (unset: .venv, made here)
#   MODULES         environment modules to load first, where a cluster has them: 'python/3.11 cuda/12.4'
#   TORCH_INDEX_URL where set-up takes PyTorch from, where the driver is too old for PyPI's build:
#                   https://download.pytorch.org/whl/cu126
#   CAPTION_ARGS    further flags for img_captioning.py
#   TRAIN_ARGS      further flags for train_text_to_image.py
#   INFERENCE_ARGS  further flags for inference.py

# shellcheck disable=SC2034,SC2154 # variables that only the sourced files set or read
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh job.sh
set +o posix
set -euo pipefail

REAL_MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5

main() {
    local part
    case "${1-}" in
        '' | setup | captions) ;;
        *) fail 2 "job.sh takes 'setup', 'captions' or no argument, found '$1'; its choices come from the environment" ;;
    esac
    repo="$(find_repository)"
    scripts="$repo/text_to_image"
    for part in choices setup hub batch; do
        # shellcheck source=/dev/null
        source "$scripts/slurm/$part.sh"
    done
    listen_to_slurm
    read_choices
    load_modules
    choose_environment
    if [[ "${1-}" == setup ]]; then
        fetch
    else
        run_job "${1-}"
    fi
}

# A log that cannot be written, or whose reader is gone, ends nothing.
trap : PIPE
say() { printf '%s\n' "$*" 2>/dev/null || :; }

fail() {
    printf 'error: %s\n' "$2" >&2 || :
    exit "$1"
}

# Prints the folder that holds text_to_image/: this script's own, except under Slurm, which runs a copy of it.
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
    fail 2 'text_to_image/ is not beside job.sh; submit it from there or from text_to_image/'
}

run_job() {
    local folder
    local -a caption_args train_args inference_args captioning training generation pictures captions
    read_words CAPTION_ARGS caption_args
    check_caption_args "${caption_args[@]}"
    read_words TRAIN_ARGS train_args
    check_train_args "${train_args[@]}"
    read_words INFERENCE_ARGS inference_args
    # In a log file each line appears when it is written, and a progress bar only now and then.
    export PYTHONUNBUFFERED=1
    [[ -t 2 ]] || export TQDM_MININTERVAL=30
    # GPU memory in segments that grow: pictures of many sizes would leave gaps that nothing else fits into.
    [[ -n "${PYTORCH_CUDA_ALLOC_CONF-}" ]] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
    TEXT_TO_IMAGE_STATUS="$(make_status_file)" # where training writes what read_status reads
    export TEXT_TO_IMAGE_STATUS
    trap 'rm -f "$TEXT_TO_IMAGE_STATUS"' EXIT
    describe_machine
    ! in_batch || prepare_batch
    find_captions
    choose_flags

    for folder in "${pictures[@]}"; do
        HF_HUB_OFFLINE="$(captioning_offline)" step img_captioning --image_dir "$folder" "${captioning[@]}"
    done
    if [[ "$1" == captions ]]; then
        say_captions
        return
    fi
    launch=("${srun[@]}") # training alone runs on all nodes
    step train_text_to_image "${training[@]}"
    launch=()
    read_status
    case "$run_state" in
        finished) check_processes "$num_processes" ;;
        dry_run) say '== a dry run leaves no model to generate pictures with' && return ;;
        *) fail 1 'training has ended and did not say that it finished' ;;
    esac
    step inference --model "$model" "${generation[@]}"
    say_result
}

phase='' phases='' launch=() # the script that runs, the time that each took, and what starts one on other nodes

# Runs one of the three scripts; a failure ends the job with the script's exit code.
step() {
    local code=0 began=$SECONDS
    phase="$1"
    say $'\n'"== $phase.py"
    if in_batch; then
        [[ -z "$called_off" ]] || requeue
        attend "${launch[@]}" "$venv/bin/python" "$scripts/$phase.py" "${@:2}" || code=$?
    else
        "$venv/bin/python" "$scripts/$phase.py" "${@:2}" || code=$?
    fi
    phases="$phases${phases:+, }$phase $((SECONDS - began)) s"
    [[ "$phase" == inference && "$code" == 0 ]] || [[ -z "$called_off" ]] || requeue
    if ((code == 75)) && in_batch; then # preempted: Slurm queues the job up again at the end of the time it gives
        say '== stopped by a signal to the run itself: waiting for Slurm to end this job'
        sleep 300
    fi
    ((code == 0)) || exit "$code"
}

# Sets what training says of itself; `run_state` is empty where it has said nothing.
read_status() {
    local -a fields
    mapfile -td '' fields < <("$venv/bin/python" "$scripts/slurm/print_status.py" "$TEXT_TO_IMAGE_STATUS")
    run_state="${fields[0]-}" steps_done="${fields[1]-}" steps="${fields[2]-}"
    num_processes="${fields[3]-}" model="${fields[4]-}"
}

say_captions() {
    ((${#pictures[@]})) || fail 2 "DATASET=${datasets[*]}: no folder of pictures, so there are no captions to be written"
    forget_restarts
    say
    say "== nothing is trained yet: read the captions in ${captions[*]}, and correct what is wrong"
}

say_result() {
    forget_restarts
    say $'\n'"== done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $phases"
    say "the model: $model"
    [[ ! -f "$model/report.html" ]] || say "what it learned, a page for a browser: $model/report.html"
    [[ ! -f "${pictures_dir:-$samples}/index.html" ]] || say "its pictures: ${pictures_dir:-$samples}/index.html"
    [[ -z "${MODEL-}" && "${TRAIN_ARGS-}" != *--pretrained_model_name_or_path* ]] || return 0
    say
    say 'The model that was fine-tuned is the starter of this repository, a small one that was trained on rendered'
    say 'pictures of garments laid flat on white and knows nothing else. A real one is named like this:'
    say "    ${DATASET:+DATASET=$(printf '%q' "$DATASET") }MODEL=$REAL_MODEL sbatch job.sh"
}

main "$@"
exit
