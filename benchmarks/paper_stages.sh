# What paper_simcse.sh and paper_gte.sh share; they source it. A stage that is finished is not run again, one that was stopped
# goes on from its newest checkpoint. Environment variables of both scripts, all optional:
#
#     OUTPUT             where the run goes (a folder; default: in outputs/papers)
#     TABLE              the Markdown file that gets the row (default: docs/paper_runs.md)
#     MODEL              a folder or a Hub name in place of the model that the YAML file names
#     NUM_PROCESSES      how many processes train; the batch is divided among them (default: one for each GPU, else one)
#     ACCELERATE_CONFIG  a file of `accelerate launch` (default: of recipes/accelerate, by the number of processes and GPUs)
#     PYTHON             the interpreter (default: python)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
table=${TABLE:-$root/docs/paper_runs.md}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}  # the package of this clone, whose commit the row names

fail() {
    echo "error: $*" >&2
    exit 2
}

# Refuse what would otherwise be found out after the training. PAPER FLAGS...
check() {
    local paper=$1 flag
    shift
    for flag in "$@"; do
        case $flag in
            --output_dir | --output_dir=*) fail "$flag: name the folder by OUTPUT=FOLDER before the command" ;;
            --config | --config=*) fail "$flag: the script takes the paper's file; a flag overrides a setting of it" ;;
        esac
    done
    if [[ ! -w $table ]] || ! grep -q "^| $paper |" "$table"; then
        fail "TABLE=$table: no file with a table of $paper that can be written to; copy docs/paper_runs.md there"
    fi
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    processes=${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "NUM_PROCESSES=$processes: give a whole number of at least 1"
    local file=cpu_2
    if ((processes == 1)); then file=single; elif ((gpus > 0)); then file=ddp_8gpu; fi
    accelerate_config=${ACCELERATE_CONFIG:-$root/recipes/accelerate/$file.yaml}
}

# Start a recipe in the processes. RECIPE FLAGS...
launch() {
    local recipe=$root/recipes/$1
    shift
    "$python" -m accelerate.commands.launch --quiet --config_file "$accelerate_config" --num_processes "$processes" "$recipe" "$@"
}

# Tell whether a stage has left something to go on with, or is finished. FOLDER, or the FILE that it makes
has_begun() {
    [[ -f $1 || -e $1.work || -e $1/results.json ]] || compgen -G "$1/checkpoint-*" >/dev/null || compgen -G "$1/seed-*" >/dev/null
}

# Write down with which flags and at which commit a stage begins; what is there has to have begun with the same flags.
# FOLDER or FILE, FLAGS...
begin() {
    local place=$1 flags commit=unknown
    shift
    printf -v flags '%q ' "$@"
    if has_begun "$place"; then
        if [[ ! -f $place.started || $(head -n 1 "$place.started") != "$flags" ]]; then
            fail "$place is there, and not of this command ($place.started has its flags); remove both, or give another OUTPUT=FOLDER"
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

# Train, unless that is done. RECIPE FOLDER BATCH FLAGS...; BATCH is that of all processes together
train() {
    local recipe=$1 folder=$2 batch=$3 resume=
    shift 3
    ((batch % processes == 0)) || fail "the paper's batch of $batch cannot be divided among $processes processes; give another NUM_PROCESSES"
    begin "$folder" "$recipe" "$@"
    if [[ -f $folder/results.json ]]; then
        echo "$folder is trained; it stays as it is"
        return
    fi
    ! has_begun "$folder" || resume=--resume_from_checkpoint
    local precision=
    ((gpus == 0)) || precision=--bf16
    launch "$recipe" --output_dir "$folder" --per_device_train_batch_size $((batch / processes)) $precision "$@" $resume
    [[ -f $folder/results.json ]] || fail "$recipe left no $folder/results.json: nothing was trained"
}

# The batch in a YAML file, per process.
batch_in() {
    sed -n 's/^per_device_train_batch_size: *\([0-9]*\).*/\1/p' "$1"
}

# Append the row. PAPER RUN FOLDER...; the last folder has the scores
add_row() {
    "$python" "$root/benchmarks/paper_row.py" "$@" --table "$table"
}
