#!/usr/bin/env bash
# Train GTE as in the paper: stage 1, then stage 2 (on mined negatives, if PAIRS is set). Score the model on MTEB, and append
# the scores to docs/paper_runs.md.
#
#     benchmarks/paper_gte.sh base
#     PAIRS=pairs.jsonl benchmarks/paper_gte.sh small         # stage 2 on these pairs and on negatives from the stage-1 model
#     SOURCES=mine.yaml FINETUNE_SOURCES=labeled.yaml NUM_PROCESSES=4 benchmarks/paper_gte.sh base
#
# paper_gte.sh [small|base|large] [FLAGS of both recipes ...]
#
# The settings are those of recipes/configs/gte_{pretrain,finetune}_SIZE.yaml: batches of 16,384 and 128 rows in total, for any
# number of processes. Install mteb first: `pip install mteb`. The models, the sources and the data of MTEB come from the Hub
# (docs/papers.md explains how the sources differ from the paper's). If the script is stopped, the same command resumes it:
# finished stages and finished MTEB tasks are not run again. On GPUs, the training uses bfloat16. Time and memory were not
# measured; docs/scaling.md computes them.
#
# Environment variables, in addition to those of paper_stages.sh:
#
#     SOURCES            a sources file for stage 1, instead of the one in recipes/sources
#     FINETUNE_SOURCES   a sources file for stage 2, instead of the one in recipes/sources
#     PAIRS              a file of pairs for stage 2, for which negatives are mined
#     MTEB_TASKS         names of tasks, separated by spaces, instead of the paper's 56 datasets ("MTEB(eng, v1)" in mteb)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/paper_stages.sh"

size=base
if [[ $# -gt 0 && $1 != -* ]]; then size=$1 && shift; fi
configs=$root/recipes/configs
[[ $size != quickstart && -f $configs/gte_pretrain_$size.yaml ]] || fail "there are no settings for '$size'; give small, base or large"
folder=${OUTPUT:-outputs/papers/gte_$size}
folder=${folder%/}
of_all_gpus() { echo $((8 * $(batch_in "$1"))); }  # the YAML files give the batch of one of 8 GPUs

check GTE "$@"
"$python" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("mteb") is None)' || fail "mteb is not installed; run pip install mteb"
[[ -z ${PAIRS:-} || -z ${FINETUNE_SOURCES:-} ]] || fail "PAIRS and FINETUNE_SOURCES are both given; give one"

train gte_pretrain.py "$folder/pretrain" "$(of_all_gpus "$configs/gte_pretrain_$size.yaml")" \
    --config "$configs/gte_pretrain_$size.yaml" ${MODEL:+--model_name_or_path "$MODEL"} ${SOURCES:+--sources "$SOURCES"} "$@"
if [[ -n ${PAIRS:-} ]]; then
    begin "$folder/mined.jsonl" "$PAIRS"
    if [[ ! -f $folder/mined.jsonl ]]; then
        launch mine_hard_negatives.py "$folder/pretrain" --train_file "$PAIRS" --output_file "$folder/mined.jsonl" --num_negatives 7
    fi
    FINETUNE_SOURCES=$folder/mined.yaml
    printf -- '- name: mined\n  file: mined.jsonl\n' >"$FINETUNE_SOURCES"
fi
train gte_finetune.py "$folder/finetune" "$(of_all_gpus "$configs/gte_finetune_$size.yaml")" \
    --config "$configs/gte_finetune_$size.yaml" --model_name_or_path "$folder/pretrain" \
    ${FINETUNE_SOURCES:+--sources "$FINETUNE_SOURCES"} "$@"
if [[ -n ${MTEB_TASKS:-} ]]; then
    "$python" "$root/recipes/evaluate_mteb.py" "$folder/finetune" --tasks $MTEB_TASKS
else
    "$python" "$root/recipes/evaluate_mteb.py" "$folder/finetune" --benchmark "MTEB(eng, v1)"
fi
add_row GTE "$size" "$folder/pretrain" "$folder/finetune"
