# What set-up downloads from the model hub, and whether a job can do without asking the hub.
# Sourced by job.sh; uses its say, repo, outputs, scripts, venv and captioner.
#
# output/.fetched remembers what was downloaded: a line for each set of names, and 'captioner NAME' for a captioner.
# shellcheck shell=bash disable=SC2034,SC2154

went_offline='' # this job asks the hub nothing

fetch() {
    local dataset
    local -a caption_args train_args names=()
    [[ -n "${MODEL-}${DATASET-}${CAPTIONER-}${CAPTION_ARGS-}${TRAIN_ARGS-}" ]] || return 0
    read_words CAPTION_ARGS caption_args
    check_caption_args "${caption_args[@]}"
    read_words TRAIN_ARGS train_args
    check_train_args "${train_args[@]}"
    for dataset in "${datasets[@]}"; do
        names+=(--dataset "$dataset")
    done
    train_args=("${names[@]}" ${MODEL:+--pretrained_model_name_or_path "$MODEL"}
        ${METADATA_FILE:+--metadata_file "$METADATA_FILE"} "${train_args[@]}")
    mkdir -p "$outputs"
    "$venv/bin/python" "$scripts/slurm/fetch.py" "$outputs/.fetched" "$captioner" \
        "${#caption_args[@]}" "${caption_args[@]}" "${#train_args[@]}" "${train_args[@]}" || exit
    named >>"$outputs/.fetched"
}

# Prints all that names something on the hub for training, on one line.
HUB_FLAGS='pretrained_model_name_or_path|revision|non_ema_revision|variant|cache_dir|dataset_config_name'
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

was_fetched() { grep -qsxF "$1" "$outputs/.fetched"; }

# Asks the hub nothing where set-up has downloaded what this very job names: a compute node may have no internet.
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

# Prints HF_HUB_OFFLINE for captioning: set-up downloads a captioner only where a picture had no caption then.
captioning_offline() {
    if [[ -z "$went_offline" || -d "$captioner" ]] || was_fetched "captioner $captioner"; then
        echo "${HF_HUB_OFFLINE-}"
    else
        echo 0
    fi
}
