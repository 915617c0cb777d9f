#!/usr/bin/env bash
# The data of an experiment on a Ray cluster: an engine on every GPU (or CPU node), shards to whoever is free.
#
#   ray start --head --port=6379                      on the first node
#   ray start --address=FIRST:6379                    on each other node
#   RAY_ADDRESS=FIRST:6379 bash pipelines/ray.sh      on the machine that gets the dataset; the others need not see it
#
# All nodes have the same dpkd-offline and see the models. TEACHER, STUDENT and RECIPE (such as pipelines/qwen3.yaml, of
# which the sections of the stages are read) come from the environment.
set -euo pipefail

: "${TEACHER:?a model folder or Hub name}" "${STUDENT:?a model folder or Hub name}" "${RECIPE:?a recipe}"
: "${DATASET:=runs/ray/dataset}"

data=(--cluster ray --config "$RECIPE" --dataset "$DATASET")
dpkd-offline generate "${data[@]}" --role teacher --model "$TEACHER"
dpkd-offline generate "${data[@]}" --role student --model "$STUDENT"
dpkd-offline score-teacher "${data[@]}" --model "$TEACHER"
