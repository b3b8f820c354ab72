# What job.sh takes from its environment: names, paths, and the words of further flags.
# Sourced by job.sh; uses its say, fail, repo, venv and scripts.
# shellcheck shell=bash disable=SC2034,SC2154

# The choices as given, with ~ expanded; sets `datasets`, `output_dir`, `pictures_dir`, and `captioner`
# (empty: the starter's), and `outputs` and `samples`, where results go that no variable places.
read_choices() {
    local name home=~
    unset PYTHONSAFEPATH # with it Python does not look for a script's modules beside the script
    if [[ -n "${TMPDIR-}" && ! (-d "$TMPDIR" && -w "$TMPDIR") ]]; then
        say "TMPDIR=$TMPDIR is not a folder that can be written to: /tmp is used"
        export TMPDIR=/tmp
    fi
    # A shell expands ~ in MODEL=~/sd15, but not in MODEL="~/sd15".
    for name in MODEL CAPTIONER DATASET METADATA_FILE OUTPUT_DIR PICTURES_DIR VENV; do
        [[ ! "${!name-}" =~ ^~(/|$) ]] || printf -v "$name" %s "$home${!name:1}"
    done
    if [[ (-n "${model-}" && -z "${MODEL-}") || (-n "${train_dir-}" && -z "${DATASET-}") ]]; then
        # shellcheck disable=SC2016 # these are names
        say '$model and $train_dir are not read: the names are MODEL and DATASET now'
    fi
    read_datasets "$home"
    output_dir="${OUTPUT_DIR-}" pictures_dir="${PICTURES_DIR-}"
    outputs="$(own_or_current output)" samples="$(own_or_current Generated_sample)"
    captioner="${CAPTIONER-${MODEL:+Salesforce/blip-image-captioning-large}}"
}

# Sets `datasets` to the folders that DATASET names, with a colon between them, as in PATH; one that is there as a whole
# is one, whatever its name.
read_datasets() {
    local number
    datasets=("${DATASET:-$repo/dataset}")
    # A colon more, as each ends a name: `read` would drop an empty last one, and what follows a newline.
    [[ -e "${datasets[0]}" || "${datasets[0]}" != *:* ]] || mapfile -td : datasets < <(printf '%s:' "$DATASET")
    for number in "${!datasets[@]}"; do
        [[ -n "${datasets[number]}" ]] || fail 2 "DATASET=$DATASET: a name before or after a colon is empty"
        [[ ! "${datasets[number]}" =~ ^~(/|$) ]] || datasets[number]="$1${datasets[number]:1}"
    done
}

# Prints the repository's folder of this name; that of the current folder where the repository is read-only, as
# runtime/paths.py chooses.
own_or_current() {
    local own="$repo/$1" existing="$repo"
    [[ ! -e "$own" ]] || existing="$own"
    [[ -w "$existing" && -x "$existing" ]] || own="$PWD/$1"
    printf '%s' "$own"
}

# Prints the name of a new file with room for what training writes into it: TMPDIR may be full, or fill up meanwhile.
make_status_file() {
    local folder file
    for folder in "${TMPDIR:-/tmp}" "$outputs" "$PWD"; do
        file="$({ mkdir -p "$folder" && mktemp -p "$folder" .status.XXXXXXXX; } 2>/dev/null)" || continue
        if printf '%4096s' '' 2>/dev/null >"$file"; then
            printf '%s' "$file"
            return
        fi
        rm -f "$file"
    done
    fail 1 "no room for a file of 4 kB in ${TMPDIR:-/tmp}, $outputs or $PWD"
}

# read_words VARIABLE ARRAY: splits it as a shell does, quotes included; nothing is expanded or run.
read_words() {
    local -n into="$2" # a name for the caller's array
    local lines
    lines="$(xargs -r printf '%s\n' <<<"${!1-}" 2>/dev/null && echo end)" ||
        fail 2 "$1 has a quote without its partner: ${!1}"
    mapfile -t into <<<"$lines"
    unset 'into[-1]' # 'end', which keeps an empty last word
}

# Refuses what has a variable of its own, and what must not happen again at each restart.
check_caption_args() {
    case " $* " in
        *' --existing replace '* | *' --existing=replace '*) fail 2 'CAPTION_ARGS: a job that is started again would '\
'replace captions that you have corrected; run img_captioning.py --existing replace by hand' ;;
    esac
    local word
    for word in "$@"; do
        case "$word" in
            --model | --model=*) fail 2 'CAPTION_ARGS: the captioner is named by CAPTIONER' ;;
            --image_dir | --image_dir=*) fail 2 'CAPTION_ARGS: the folder is named by DATASET' ;;
            --output | --output=*) fail 2 'CAPTION_ARGS: the file is named by METADATA_FILE' ;;
        esac
    done
}

# Sets `pictures`, the folders in which pictures may lack a caption, of those that training reads, and `captions`, the
# files in which these are to be read; tar shards and parquet files have captions of their own, and neither.
find_captions() {
    local dataset
    local -a paths
    pictures=() captions=()
    for dataset in "${datasets[@]}"; do
        mapfile -td '' paths < <("$venv/bin/python" "$scripts/slurm/captioned_folder.py" "$dataset" \
            ${METADATA_FILE:+"$METADATA_FILE"})
        wait "$!" || exit
        pictures+=("${paths[@]:0:1}") captions+=("${paths[@]:1:1}")
    done
}

# What the job does with the data set itself, too, has a variable: it would caption one and train on another.
check_train_args() {
    local word
    for word in "$@"; do
        case "$word" in
            --metadata_file | --metadata_file=*) fail 2 'TRAIN_ARGS: the file of the captions is named by METADATA_FILE' ;;
            --dataset | --dataset=* | --train_data_dir | --train_data_dir=* | --dataset_name | --dataset_name=*)
                fail 2 "TRAIN_ARGS: the data set is named by DATASET, and not by ${word%%=*}" ;;
        esac
    done
}

# Sets the flags of the three scripts. What stands later wins, so CAPTION_ARGS, TRAIN_ARGS and INFERENCE_ARGS do.
choose_flags() {
    local precision dataset
    precision="$("$venv/bin/python" "$scripts/slurm/environment.py" precision)"
    captioning=(${captioner:+--model "$captioner"}
        ${METADATA_FILE:+--output "$METADATA_FILE"}
        ${SLURM_ARRAY_TASK_ID:+--wait} "${caption_args[@]}") # one task of an array captions, the others wait for it
    training=()
    for dataset in "${datasets[@]}"; do
        training+=(--dataset "$dataset")
    done
    training+=(${EPOCHS:+--epochs "$EPOCHS"} ${MODEL:+--pretrained_model_name_or_path "$MODEL"}
        ${output_dir:+--output_dir "$output_dir"} ${precision:+--mixed_precision "$precision"} ${seed:+--seed "$seed"}
        ${METADATA_FILE:+--metadata_file "$METADATA_FILE"} "${train_args[@]}")
    generation=(--num_images "${NUM_IMAGES:-3}" --resume ${PROMPT:+"--prompt=$PROMPT"}
        ${pictures_dir:+--output_dir "$pictures_dir"} "${inference_args[@]}")
    "$venv/bin/python" "$scripts/slurm/check_flags.py" "${#captioning[@]}" "${captioning[@]}" \
        "${#training[@]}" "${training[@]}" "${#generation[@]}" "${generation[@]}"
}
