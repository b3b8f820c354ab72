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
#
# From a folder of pictures to new pictures: set-up, captions, fine-tuning, generation.
#
#   bash job.sh          here and now
#   bash job.sh setup    the set-up alone, for a login node whose compute nodes have no internet
#   sbatch job.sh        under Slurm
#
# Choices come from the environment, for example
#   DATASET=~/pictures MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5 sbatch job.sh
#
#   MODEL           what is fine-tuned: a folder or a hub id (unset: the small starter model of this repository)
#   CAPTIONER       captions the pictures that have no caption: a BLIP folder or hub id (unset: the starter's)
#   DATASET         the folder of pictures, or a hub id (unset: dataset/)
#   EPOCHS          passes over the data set (100)
#   OUTPUT_DIR      where the fine-tuned model goes (unset: a folder in output/ named after data and settings)
#   PROMPT          what to draw (unset: two short prompts and three captions of the data set)
#   NUM_IMAGES      pictures for each prompt (3)
#   VENV            a Python environment that exists, used as it is (unset: .venv, made here)
#   TRAIN_ARGS      further flags for train_text_to_image.py
#   INFERENCE_ARGS  further flags for inference.py

set -euo pipefail

REAL_MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5

main() {
    case "${1-}" in
        '' | setup) ;;
        *) fail 2 "job.sh takes no argument but 'setup', found '$1'; its choices come from the environment" ;;
    esac
    repo="$(find_repository)"
    scripts="$repo/text_to_image"
    venv="${VENV:-$repo/.venv}"
    if [[ -z "${VENV-}" ]]; then
        set_up
    elif [[ ! -x "$venv/bin/python" ]]; then
        fail 2 "VENV=$VENV is no Python environment: it has no bin/python"
    fi
    [[ "${1-}" == setup ]] || run_job
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
    wanted="$(cksum <"$repo/requirements.txt")"
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
    [[ "$(setup_state)" == "$wanted" ]] && "$venv/bin/python" -c '' 2>/dev/null
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
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --requirement "$repo/requirements.txt" ||
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

# --- the job --------------------------------------------------------------------------------------------------------

run_job() {
    local words precision
    local -a train_args=() inference_args=()
    words="$(words_of TRAIN_ARGS)"
    [[ -z "$words" ]] || mapfile -t train_args <<<"$words"
    words="$(words_of INFERENCE_ARGS)"
    [[ -z "$words" ]] || mapfile -t inference_args <<<"$words"
    dataset="${DATASET:-$repo/dataset}"
    # In a log file each line appears when it is written, and a progress bar only now and then.
    export PYTHONUNBUFFERED=1
    [[ -t 2 ]] || export TQDM_MININTERVAL=30
    log="$(mktemp)"
    trap 'rm -f "$log"' EXIT

    if [[ -d "$dataset" ]]; then
        step img_captioning --image_dir "$dataset" ${CAPTIONER:+--model "$CAPTIONER"}
    fi
    choose_prompts
    precision="$(find_precision)"
    step train_text_to_image --dataset "$dataset" --epochs "${EPOCHS:-100}" \
        ${MODEL:+--pretrained_model_name_or_path "$MODEL"} ${OUTPUT_DIR:+--output_dir "$OUTPUT_DIR"} \
        ${precision:+--mixed_precision "$precision"} "${train_args[@]}" | tee "$log"
    # Also a run that was finished before says this.
    model="$(sed -n 's/^the model  *//p' "$log" | tail -n 1)"
    step inference ${model:+--model "$model"} --num_images "${NUM_IMAGES:-3}" "${prompts[@]/#/--prompt=}" \
        "${inference_args[@]}" | tee "$log"
    say_where
}

# Runs one of the three scripts; its exit code ends the job.
step() {
    local script="$1"
    shift
    printf '\n== %s.py\n' "$script"
    "$venv/bin/python" "$scripts/$script.py" "$@"
}

# The words of a variable one a line, as a shell reads them, quotes included; nothing is expanded or run.
words_of() {
    xargs -r printf '%s\n' <<<"${!1-}" 2>/dev/null || fail 2 "$1 has a quote without its partner: ${!1}"
}

# PROMPT, else two short prompts and three captions of the data set.
choose_prompts() {
    local lines
    local -a short=()
    if [[ -n "${PROMPT-}" ]]; then
        prompts=("$PROMPT")
        return
    fi
    [[ -d "$dataset" ]] || fail 2 "no data set folder $dataset; with a data set of the hub, say in PROMPT what to draw"
    [[ -n "${DATASET-}" ]] || short=('denim jeans' 'A single pair of denim jeans laid flat on a white background')
    lines="$("$venv/bin/python" - "$scripts" "$dataset" "${short[@]}" <<'PYTHON'
import sys
from pathlib import Path

scripts, dataset, *short = sys.argv[1:]
sys.path.insert(0, scripts)
from caption_forms import caption_forms, first_sentence
from captions import read_captions

captions = [" ".join(row.captions[0].split()) for row in read_captions(Path(dataset))[:3]]
if not short:
    forms = [form for group in caption_forms(captions[0]) for form in group]
    short = [min(forms, key=len), first_sentence(captions[0])]
print("\n".join(dict.fromkeys([*short, *captions])))
PYTHON
)"
    mapfile -t prompts <<<"$lines"
}

# Mixed precision where a GPU is used and has it. It stands before TRAIN_ARGS, so that what is said there wins.
find_precision() {
    "$venv/bin/python" - "$scripts" <<'PYTHON'
import sys

sys.path.insert(0, sys.argv[1])
from errors import exit_with, require_packages


def main():
    require_packages()
    from devices import mixed_precision

    print(mixed_precision() or "")


exit_with(main)
PYTHON
}

say_where() {
    printf '\n== done in %d min %d s\n' "$((SECONDS / 60))" "$((SECONDS % 60))"
    tail -n 1 "$log" # inference.py's last line says where the pictures are
    say "the model: $model"
    [[ -z "${MODEL-}" ]] || return 0
    say
    say 'The model that was fine-tuned is the starter of this repository, a small one that was trained on rendered'
    say 'pictures of garments laid flat on white and knows nothing else. A real one is named like this:'
    say "    ${DATASET:+DATASET=$(printf '%q' "$DATASET") }MODEL=$REAL_MODEL sbatch job.sh"
}

main "$@"
