#!/usr/bin/env bash
#SBATCH --job-name=text_to_image
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --output=job_%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#
# For `sbatch job.sh` in this folder: starts ../job.sh, which documents everything. Slurm reads the options above from
# the file that is submitted, so they stand in both; only the log's path differs.

[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh job.sh

# Slurm runs a copy of this file, and only scontrol knows where the original is.
submitted=''
if [[ -n "${SLURM_JOB_ID-}" ]] && command -v scontrol >/dev/null; then
    submitted="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/job\.sh.*|\1|p')"
fi
for folder in "$(dirname "${BASH_SOURCE[0]}")" "$submitted" "${SLURM_SUBMIT_DIR-}" "$PWD"; do
    # exec keeps the process: its parent tells ../job.sh that it is a batch script.
    [[ ! -f "$folder/train_text_to_image.py" ]] || exec bash "$folder/../job.sh" "$@"
done
echo 'error: the scripts are not beside job.sh; submit it from text_to_image/ or from the folder above' >&2
exit 2
