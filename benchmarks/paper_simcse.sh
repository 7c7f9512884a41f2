#!/usr/bin/env bash
# Train SimCSE as in the paper, score the model on the seven STS sets, and append the scores to docs/paper_runs.md.
#
#     benchmarks/paper_simcse.sh                              # unsupervised, BERT-base
#     benchmarks/paper_simcse.sh sup roberta_large
#     benchmarks/paper_simcse.sh unsup bert_base --seeds 1,2,3
#     NUM_PROCESSES=4 OUTPUT=runs/sup TRAIN_FILE=nli.csv benchmarks/paper_simcse.sh sup
#
# paper_simcse.sh [unsup|sup] [bert_base|bert_large|roberta_base|roberta_large] [FLAGS of the recipe ...]
#
# The settings are those of recipes/configs/{unsup,sup}_simcse_MODEL.yaml. The model, the training file (10^6 sentences of
# Wikipedia, or the NLI triplets) and the evaluation sets come from the Hub. If the script is stopped, the same command resumes
# it; finished trainings are not run again. On GPUs, the training uses bfloat16; `--bf16 false` turns it off. Time and memory
# were not measured.
#
# Environment variables: TRAIN_FILE (a file or an address, instead of the paper's training file), and those of paper_stages.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/paper_stages.sh"

kind=unsup model=bert_base
if [[ ${1:-} == unsup || ${1:-} == sup ]]; then kind=$1 && shift; fi
if [[ $# -gt 0 && $1 != -* ]]; then model=$1 && shift; fi
config=$root/recipes/configs/${kind}_simcse_$model.yaml
[[ $model != quickstart && -f $config ]] || fail "there are no settings for '$model'; give unsup or sup, then bert_base, bert_large, roberta_base or roberta_large"
folder=${OUTPUT:-outputs/papers/${kind}_simcse_$model}
folder=${folder%/}

check SimCSE "$@"
train "${kind}_simcse.py" "$folder" "$(batch_in "$config")" --config "$config" \
    ${MODEL:+--model_name_or_path "$MODEL"} ${TRAIN_FILE:+--train_file "$TRAIN_FILE"} "$@"
launch evaluate.py "$folder" --seven_sts --output_dir "$folder"
add_row SimCSE "$kind $model" "$folder"
