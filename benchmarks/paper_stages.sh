# The code that paper_simcse.sh and paper_gte.sh share; both scripts source this file. A finished stage is not run again. A
# stage that was stopped resumes from its newest checkpoint. Both scripts read these environment variables, all optional:
#
#     OUTPUT             the folder of the run (default: a folder in outputs/papers)
#     TABLE              the Markdown file to which the row is appended (default: docs/paper_runs.md)
#     MODEL              a folder or a Hub name, instead of the model that the YAML file names
#     NUM_PROCESSES      the number of processes, which share the batch (default: one for each GPU, or one without GPUs)
#     ACCELERATE_CONFIG  a config file of `accelerate launch` (default: a file of recipes/accelerate that fits the processes)
#     PYTHON             the Python interpreter (default: python)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
table=${TABLE:-$root/docs/paper_runs.md}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}  # use the package of this clone, because the row names its commit

fail() {
    echo "error: $*" >&2
    exit 2
}

# Check everything that would otherwise fail only after the training. Arguments: PAPER FLAGS...
check() {
    local paper=$1 flag
    shift
    for flag in "$@"; do
        case $flag in
            --output_dir | --output_dir=*) fail "$flag is not supported here; set OUTPUT=FOLDER before the command" ;;
            --config | --config=*) fail "$flag is not supported here; override single settings of the paper with their flags" ;;
        esac
    done
    if [[ ! -w $table ]] || ! grep -q "^| $paper |" "$table"; then
        fail "TABLE=$table: this is not a writable file with a table of $paper; copy docs/paper_runs.md there"
    fi
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    processes=${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "NUM_PROCESSES=$processes: give a whole number of at least 1"
    local file=cpu_2
    if ((processes == 1)); then file=single; elif ((gpus > 0)); then file=ddp_8gpu; fi
    accelerate_config=${ACCELERATE_CONFIG:-$root/recipes/accelerate/$file.yaml}
}

# Start a recipe in $processes processes. Arguments: RECIPE FLAGS...
launch() {
    local recipe=$root/recipes/$1
    shift
    "$python" -m accelerate.commands.launch --quiet --config_file "$accelerate_config" --num_processes "$processes" "$recipe" "$@"
}

# Succeed if a stage is finished or can be resumed. Argument: the FOLDER of the stage, or the FILE that it writes
has_begun() {
    [[ -f $1 || -e $1.work || -e $1/results.json ]] || compgen -G "$1/checkpoint-*" >/dev/null || compgen -G "$1/seed-*" >/dev/null
}

# Record the flags and the commit with which a stage begins. If the stage has already begun, check that it has the same flags.
# Arguments: FOLDER or FILE, FLAGS...
begin() {
    local place=$1 flags commit=unknown
    shift
    printf -v flags '%q ' "$@"
    if has_begun "$place"; then
        if [[ ! -f $place.started || $(head -n 1 "$place.started") != "$flags" ]]; then
            fail "$place belongs to another command ($place.started has its flags); remove both, or set another OUTPUT=FOLDER"
        fi
    else
        mkdir -p "$(dirname "$place")"
        printf '%s\n' "$flags" >"$place.started"
    fi
    [[ -f $place || -f $place/results.json ]] && return
    if git -C "$root" rev-parse --quiet --verify HEAD >/dev/null 2>&1; then
        commit=$(git -C "$root" rev-parse --short HEAD)
        git -C "$root" diff --quiet HEAD -- hf_embed recipes || commit+=" with changes"
    fi
    printf '%s\n' "$commit" >>"$place.started"
}

# Train, unless the training is finished. Arguments: RECIPE FOLDER BATCH FLAGS...; BATCH is the batch of all processes together
train() {
    local recipe=$1 folder=$2 batch=$3 resume=
    shift 3
    ((batch % processes == 0)) || fail "the paper's batch of $batch cannot be divided equally among $processes processes; set another NUM_PROCESSES"
    begin "$folder" "$recipe" "$@"
    if [[ -f $folder/results.json ]]; then
        echo "$folder is already trained; skipping its training"
        return
    fi
    ! has_begun "$folder" || resume=--resume_from_checkpoint
    local precision=
    ((gpus == 0)) || precision=--bf16
    launch "$recipe" --output_dir "$folder" --per_device_train_batch_size $((batch / processes)) $precision "$@" $resume
    [[ -f $folder/results.json ]] || fail "$recipe did not write $folder/results.json, so nothing was trained; see its messages above"
}

# Print the batch of one process from a YAML file. Argument: FILE
batch_in() {
    sed -n 's/^per_device_train_batch_size: *\([0-9]*\).*/\1/p' "$1"
}

# Append the row to the table. Arguments: PAPER RUN FOLDER...; the last folder has the scores
add_row() {
    "$python" "$root/benchmarks/paper_row.py" "$@" --table "$table"
}
