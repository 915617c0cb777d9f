#!/usr/bin/env bash
# The data of an experiment as SLURM job arrays: eight workers share the shards of each stage, then one job trains.
#
#   bash pipelines/slurm.sh                                           submits everything; what is done is skipped
#   sbatch --array=0-7 pipelines/slurm.sh distill study.yaml          eight workers share the students of a study
#
# Of the former, TEACHER, STUDENT and RECIPE (such as pipelines/qwen3.yaml, of which the sections of the stages are read)
# come from the environment. All paths lie on a file system that every node sees.
# Two minutes before the time limit SLURM sends USR1. Then the stage ends with exit code 75, and the job queues again.
#SBATCH --gpus=1
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ $# -gt 0 ]; then # in a job: run one stage
    code=0
    srun dpkd-offline "$@" || code=$?
    if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$code"
fi

: "${TEACHER:?a model folder or Hub name}" "${STUDENT:?a model folder or Hub name}" "${RECIPE:?a recipe}"
: "${DATASET:=runs/slurm/dataset}" "${OUTPUT:=runs/slurm/student}" "${WORKERS:=8}"
export TEACHER STUDENT RECIPE DATASET OUTPUT

submit() { # submit NAME OPTIONS-OF-SBATCH... -- STAGE...: prints the job's id
    local name=$1 options=()
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    sbatch --parsable --job-name="dpkd-$name" "${options[@]}" "$0" "$@" | cut -d';' -f1
}

array=--array=0-$((WORKERS - 1))
generate=(generate --config "$RECIPE" --dataset "$DATASET")
teacher=$(submit teacher "$array" -- "${generate[@]}" --role teacher --model "$TEACHER")
student=$(submit student "$array" "--dependency=afterok:$teacher" -- "${generate[@]}" --role student --model "$STUDENT")
pairs=$(submit pairs "$array" "--dependency=afterok:$student" -- \
    score-teacher --config "$RECIPE" --dataset "$DATASET" --model "$TEACHER")
train=$(submit train "--dependency=afterok:$pairs" -- \
    train --config "$RECIPE" --dataset "$DATASET" --student "$STUDENT" --output "$OUTPUT")
echo "submitted: $teacher $student $pairs $train"
