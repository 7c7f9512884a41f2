#!/usr/bin/env bash
# GTE as in the paper: stage 1, stage 2 (on mined negatives, if pairs are given), MTEB; appends the scores to docs/paper_runs.md.
#
#     benchmarks/paper_gte.sh base
#     PAIRS=pairs.jsonl benchmarks/paper_gte.sh small         # stage 2 on these, with negatives mined by the model of stage 1
#     SOURCES=mine.yaml FINETUNE_SOURCES=labelled.yaml NUM_PROCESSES=4 benchmarks/paper_gte.sh base
#
# paper_gte.sh [small|base|large] [FLAGS of both recipes ...]
#
# The settings are those of recipes/configs/gte_{pretrain,finetune}_SIZE.yaml: batches of 16,384 and 128 in all, whatever the
# number of processes. Needs `pip install mteb`. Models, sources (docs/papers.md says how they differ from the paper's) and
# MTEB's data come from the Hub. The same command goes on where it was stopped: a finished stage, and a task of MTEB that is
# done, is not run again. On GPUs it trains in bfloat16. Time and memory were not measured; docs/gte.md estimates them.
#
# Environment: SOURCES and FINETUNE_SOURCES (files of sources for stage 1 and 2, in place of those in recipes/sources), PAIRS,
# MTEB_TASKS (names, between spaces, in place of the paper's 56 sets, which mteb calls "MTEB(eng, v1)"), and those of
# paper_stages.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/paper_stages.sh"

size=base
if [[ $# -gt 0 && $1 != -* ]]; then size=$1 && shift; fi
configs=$root/recipes/configs
[[ $size != quickstart && -f $configs/gte_pretrain_$size.yaml ]] || fail "no settings of '$size': give small, base or large"
folder=${OUTPUT:-outputs/papers/gte_$size}
folder=${folder%/}
of_all_gpus() { echo $((8 * $(batch_in "$1"))); }  # the files have the batch of one of 8 GPUs

check GTE "$@"
"$python" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("mteb") is None)' || fail "mteb is not installed: pip install mteb"
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
