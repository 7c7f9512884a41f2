"""Reads flags and files into a `Plan`, and reports every mistake in them before a model is loaded."""

import copy
import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from accelerate import PartialState
from datasets import Dataset
from transformers.trainer_utils import IntervalStrategy

import hf_embed
from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.data.columns import column_names, named_columns, read_columns
from hf_embed.data.mixture import Source
from hf_embed.data.source_files import read_sources
from hf_embed.data.sources import first_cells, leave_out, read_file, read_hub
from hf_embed.entry import is_first_process
from hf_embed.errors import InputError, masked
from hf_embed.evaluation.held_out import HeldOut
from hf_embed.evaluation.retrieval import Retrieval
from hf_embed.evaluation.rows import is_number
from hf_embed.evaluation.sts import STS, read_sts
from hf_embed.evaluation.tasks import Task
from hf_embed.hub_access import find_model
from hf_embed.kit import cli
from hf_embed.kit.eval_flags import EvalArguments, joined, read_tasks
from hf_embed.kit.overwrite import EarlierRun, earlier_files
from hf_embed.kit.positives import KNOWN, WITHOUT_ROWS, add_positives, parse_positive
from hf_embed.kit.run_folder import settle_output_dir
from hf_embed.kit.schedule import settle_schedule
from hf_embed.objectives import Matryoshka, Objective, SimCSE
from hf_embed.progress import hidden_bars
from hf_embed.ranges import COUNT, Range, check_ranges, setting
from hf_embed.training.inputs import as_task
from hf_embed.training.record import on_the_hub
from hf_embed.training.settings import check_metric, default_of

logger = logging.getLogger(__name__)

QUICKSTART = Path(hf_embed.__file__).parent / "quickstart"
LANGUAGE_MODEL = QUICKSTART / "language_model"  # a built-in model that has only learned to fill in masked tokens
TRUST = "Run the model's own Python code, if it has any; read this code first."


def refuse_unused(flags: Any, names: Sequence[str], needed: str, mend: str) -> None:
    """Raise InputError if one of the flags `names` is not at its default, although the flag that it needs is not given."""
    for name in names:
        if not getattr(flags, needed) and getattr(flags, name) != default_of(type(flags).__dataclass_fields__[name]):
            raise InputError(f"--{name} has no effect without --{needed}; {mend}")


@dataclass
class ModelArguments:
    """Flags of the model."""

    model_name_or_path: str | None = setting(None, "Hub name or folder of the model. Default: a small built-in model.")
    dropout: float | None = setting(None, "Value for all dropout rates of the model. Default: the model's own rates.")
    trust_remote_code: bool = setting(False, TRUST)
    attn_implementation: str | None = setting(None, "Attention implementation: eager, sdpa, flash_attention_2 ...")
    lora_r: int = setting(0, "Rank of LoRA adapters to train; they are merged at export. 0: train all weights.")
    lora_alpha: int = setting(32, "With LoRA: the adapters are multiplied by lora_alpha / lora_r.")
    lora_dropout: float = setting(0.05, "With LoRA: dropout rate before the adapters.")
    lora_target_modules: list[str] | None = setting(
        None, "With LoRA: names of the modules to adapt. Default: every linear layer."
    )
    load_in_4bit: bool = setting(
        False, "With LoRA: hold the frozen weights in 4 bits (QLoRA; needs bitsandbytes). They are saved in float32."
    )
    save_adapter: bool = setting(False, "With LoRA: also save the adapters by themselves, in OUTPUT_DIR/adapter.")

    def __post_init__(self) -> None:
        rate, whole = Range(least=0, below=1), Range(least=0, whole=True)
        check_ranges(self, {"dropout": rate, "lora_r": whole, "lora_alpha": COUNT, "lora_dropout": rate})
        settings = ("lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit")
        refuse_unused(self, settings, "lora_r", "set the rank of the adapters, such as --lora_r 16")
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("--load_in_4bit: the package bitsandbytes is not installed; run pip install bitsandbytes")


@dataclass
class DataArguments:
    """Flags of the training rows."""

    train_file: str | None = setting(None, "Training file: txt, csv, tsv, jsonl or parquet, gzipped or not.")
    dataset_name: str | None = setting(None, "Name of a Hub dataset, instead of a file.")
    dataset_config: str | None = setting(None, "Configuration of the Hub dataset.")
    dataset_split: str = setting("train", "Split of the Hub dataset.")
    columns: list[str] = setting([], "Role of each column: anchor=question positive=answer [negative=wrong ...], or text=body.")
    eval_file: str | None = setting(
        None,
        "Held-out rows, in the format of --train_file; their loss is eval_loss. The negatives of a row are the other rows of "
        "a batch of --per_device_eval_batch_size rows.",
    )
    ignore_columns: list[str] = setting([], "Columns to ignore, for example a label beside pairs that are all positive.")
    quoting: bool = setting(True, "In a csv file, quotes enclose a cell; if off, quotes are part of the texts.")
    sources: str | None = setting(None, "YAML file that lists several sources, instead of one file; docs/gte.md shows one.")

    def __post_init__(self) -> None:
        read_columns(self.columns)
        mend = "remove it, or name a dataset on the Hub"
        refuse_unused(self, ("dataset_config", "dataset_split"), "dataset_name", mend)


DATA_FLAGS = ("train_file", "dataset_name", "sources")
HUB_FLAGS = ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")
HELD_OUT = "held_out"  # the name of the evaluation set that --eval_file makes
NO_DATA = "there is no training data; give --train_file FILE, --dataset_name NAME or --sources FILE"


@dataclass
class RunArguments:
    """Flags of the run and the model card."""

    overwrite_output_dir: bool = setting(False, "Replace the run in the output folder.")
    seeds: str | None = setting(None, "Train with each seed of 1,2,3 (not with --seed) and keep the best.")
    language: list[str] | None = setting(None, "For the card: languages of the texts, e.g. en de.")
    license: str | None = setting(None, "For the card: the license, as the Hub writes it, e.g. apache-2.0.")
    title: str | None = setting(None, "Title of the card. Default: the name of the output folder.")
    show_searches: int = setting(0, "Number of searches of each retrieval set that are printed at the end.")
    early_stopping_patience: int | None = setting(
        None, "Stop after this many evaluations without a better metric_for_best_model."
    )
    preflight: bool = setting(
        False, "Check the training rows (duplicates, lengths, false negatives ...), print a report, do not train."
    )
    preflight_sample: int | None = setting(
        None, "With --preflight: rows of each source to tokenize. 0: all. Default: 20,000, fewer for long texts."
    )
    preflight_file: str | None = setting(None, "With --preflight: file for the report, as JSON.")
    strict: bool = setting(False, "With --preflight: exit with status 1 if there are findings.")

    def __post_init__(self) -> None:
        whole = Range(least=0, whole=True)
        check_ranges(self, {"show_searches": whole, "early_stopping_patience": COUNT, "preflight_sample": whole})
        refuse_unused(self, ("preflight_sample", "preflight_file", "strict"), "preflight", "add --preflight")


@dataclass
class MatryoshkaArguments:
    """The flag of `Matryoshka`, which wraps a recipe's own objective."""

    matryoshka_dims: list[int] | None = setting(None, "Also train these widths of the embedding, e.g. 384 256 128 64.")

    def __post_init__(self) -> None:
        self.wrap(SimCSE())  # Matryoshka checks the widths

    def wrap(self, objective: Objective) -> Objective:
        """Return the objective on all given widths, or the objective itself if no widths are given."""
        return objective if self.matryoshka_dims is None else Matryoshka(objective, tuple(self.matryoshka_dims))


@dataclass
class PositiveArguments:
    """Flags of the positives of single sentences."""

    positive: str = setting("dropout", f"What a sentence is paired with: {', '.join(KNOWN)}.")
    synonyms: str | None = setting(None, "For synonym: a file whose lines hold a word, a tab, and its synonyms.")
    fill_model: str | None = setting(None, "For mask_fill: a masked language model. Default: the model itself.")

    def check_used(self) -> None:
        """Raise InputError if the kind of positive does not use a flag that is given."""
        for name, kind in (("synonyms", "synonym"), ("fill_model", "mask_fill")):
            if getattr(self, name) is not None and parse_positive(self.positive)[0] != kind:
                raise InputError(
                    f"--{name} has no effect with --positive {self.positive}; remove it, or give --positive {kind}:0.1"
                )


class Rows(NamedTuple):
    """The training rows, their name in messages, and the Hub datasets that they come from."""

    data: Dataset | list[Source]
    name: str
    datasets: list[str]


@dataclass(frozen=True)
class Plan:
    """The content of all flags and files of a run, read and checked."""

    model_args: ModelArguments
    run: RunArguments
    args: ContrastiveTrainingArguments
    objective: Objective
    rows: Dataset | list[Source]
    source: str  # the name of the rows
    tasks: dict[str, Task]
    paired: bool | None = None  # whether the rows are pairs; None: their columns decide
    positive: PositiveArguments | None = None
    datasets: list[str] = field(default_factory=list)  # names of the Hub datasets
    shows_rows: bool = True  # whether two rows are printed as the model reads them
    earlier: EarlierRun = field(default_factory=lambda: EarlierRun([]))  # its files are removed after the first step
    given: Dataset | list[Source] | None = None  # the rows before positives were made from them; None: `rows`

    @property
    def folder(self) -> Path:
        """The folder in which the run trains; see `hf_embed.kit.overwrite`."""
        return Path(str(self.args.output_dir))


def read_flags(
    own: Sequence[type], preset: Path | None = None, unless: Sequence[str] = DATA_FLAGS, argv: list[str] | None = None
) -> cli.Flags:
    """Read and check the flags that all fine-tuning recipes have, and the flags of a recipe's own dataclasses.

    Args:
        own: the recipe's own dataclasses, for example the objective. Every field is a flag.
        preset: a YAML file of settings. It applies to the flags that the user gives neither on the command line nor in the
            file of `--config`.
        unless: names of flags. If the user gives one of them, the preset is not used. Default: the flags that name data.
        argv: the words of the command line. Default: those of this process.
    """
    kinds = [*own, ModelArguments, DataArguments, EvalArguments, RunArguments, ContrastiveTrainingArguments]
    flags = cli.read_flags(kinds, preset, unless, argv)
    flags = settle_schedule(flags)
    if "seeds" in flags.given and (seed := flags.values["seed"]) != ContrastiveTrainingArguments.seed:
        raise InputError(f"--seed {seed} has no effect with --seeds; remove one of them")
    for kind in kinds:
        flags.make(kind)  # each dataclass checks its values
    refuse_unused(flags.make(ContrastiveTrainingArguments), HUB_FLAGS, "push_to_hub", "add --push_to_hub")
    for flag in ("model_name_or_path", "fill_model"):  # checked now, because reading the rows may take long
        if name := flags.values.get(flag):
            find_model(name)
    return flags


def without_data(flags: cli.Flags) -> bool:
    """Return True if the flags name no training data."""
    return not any(flags.values[flag] for flag in DATA_FLAGS)


def uses_quickstart(flags: cli.Flags) -> bool:
    """Return True if the run trains a built-in model on the built-in texts.

    Raises:
        InputError: if the user gives a model but no data.
    """
    model = flags.values["model_name_or_path"]
    if without_data(flags) and model and Path(model).parent != QUICKSTART:
        raise InputError(NO_DATA)
    return without_data(flags)


def settle_quickstart(flags: cli.Flags, name: str) -> cli.Flags:
    """Settle the output folder. The default is outputs/NAME, or outputs/quickstart for the built-in texts.

    A run in outputs/quickstart is replaced each time.
    """
    quickstart = uses_quickstart(flags)
    return settle_output_dir(flags, "quickstart" if quickstart else name, made_anew=quickstart)


def settle_language_model(flags: cli.Flags) -> cli.Flags:
    """Set the model to the built-in language model, if the user gives no model."""
    return flags if flags.values["model_name_or_path"] else flags.override(model_name_or_path=str(LANGUAGE_MODEL))


def settle_offline(
    flags: cli.Flags, name: str, make_data: Callable[[str], tuple[str, list[str]]], model: str | None = None
) -> cli.Flags:
    """Settle the output folder and, if the user gives no data, the model and the data.

    Every rank calls `make_data(model)`, which makes the data. It returns a sources file, and the evaluation sets as values of
    `--eval_retrieval_dir`. The model is the user's model, else `model`, else the built-in encoder.
    """
    offline, given = without_data(flags), flags.values["model_name_or_path"]
    flags = settle_output_dir(flags, name, made_anew=offline and not given)
    if not offline:
        return flags
    sources, sets = make_data(given or model or str(QUICKSTART / "encoder"))
    if given and PartialState().is_main_process:
        print(f"no --sources, --train_file or --dataset_name is given: training {given} on {sources}")
    sets = sets + flags.values["eval_retrieval_dir"]
    return flags.override(model_name_or_path=given or model, sources=sources, eval_retrieval_dir=sets)


def read_rows(flags: cli.Flags, built_in: str | None = None) -> Rows:
    """Read the training rows. For a run on the built-in texts, read the file `built_in` in `hf_embed/quickstart`."""
    if built_in is not None and uses_quickstart(flags):
        given = [flag for flag in ("columns", "ignore_columns") if flags.values[flag]]
        if given and not flags.values["eval_file"]:
            raise InputError(f"--{given[0]} has no effect without training data; give --train_file or --dataset_name")
        return Rows(read_file(str(QUICKSTART / built_in)), f"quickstart/{built_in}", [])
    if without_data(flags):
        raise InputError(NO_DATA)
    data = flags.make(DataArguments)
    rows, name = read_train_rows(data)
    origins = [data.dataset_name] if isinstance(rows, Dataset) else [source.origin for source in rows]
    return Rows(rows, name, sorted({origin for origin in origins if origin and on_the_hub(origin)}))


def read_scored_rows(flags: cli.Flags, built_in: str) -> Rows:
    """Read training rows with scores.

    A file without a header has the columns score, sentence1, sentence2 in this order, as for `--eval_sts_file`.
    """
    data = flags.make(DataArguments)
    file = data.train_file
    other_flags = data.columns or data.ignore_columns or data.dataset_name or data.sources or not data.quoting
    if file and not other_flags:
        cells = first_cells(file)
        if cells is not None and is_number(cells[0]):
            return Rows(read_sts(file), masked(file), [])
    return read_rows(flags, built_in)


def read_evaluation(flags: cli.Flags, built_in: str | None = None) -> dict[str, Task]:
    """Read the evaluation sets. A run on the built-in texts without any uses the STS file `built_in` in the same folder."""
    tasks, data = read_tasks(flags.make(EvalArguments)), flags.make(DataArguments)
    if built_in is not None and not tasks and uses_quickstart(flags):
        tasks = {"quickstart": STS(read_sts(str(QUICKSTART / built_in)))}
    return joined(tasks, {HELD_OUT: read_held_out(data)} if data.eval_file else {}, "--eval_file")


def make_plan(
    flags: cli.Flags,
    objective: Objective,
    rows: Rows,
    tasks: dict[str, Task],
    paired: bool | None = None,
    positive: PositiveArguments | None = None,
) -> Plan:
    """Make a plan from the flags, the rows and the evaluation sets. `positive` gives the positives of single sentences."""
    model_args, args = flags.make(ModelArguments), flags.make(ContrastiveTrainingArguments)
    run = flags.make(RunArguments)
    check_metric(args, tasks)
    check_stopping(run.early_stopping_patience, args, tasks)
    searched = any(isinstance(task, Retrieval) for task in tasks.values())
    if run.show_searches and "show_searches" in flags.given and not searched:
        raise InputError("--show_searches has no effect without a retrieval set; give --eval_retrieval_dir NAME=DIR")
    if not tasks:
        args = without_evaluation(args)
    given = rows.data
    if positive is not None:
        kind, _ = parse_positive(positive.positive)
        args = settled(args, same_dropout_mask=args.same_dropout_mask or kind == "same_mask")
        rows, paired = pair_up(rows, positive, model_args, args), kind not in WITHOUT_ROWS
    plan = Plan(model_args, run, args, objective, rows.data, rows.name, tasks, paired, positive, rows.datasets, given=given)
    if run.overwrite_output_dir and not args.resume_from_checkpoint:
        plan = dataclasses.replace(plan, earlier=EarlierRun(earlier_files(plan.folder), plan.folder))
    return plan


def check_stopping(patience: int | None, args: ContrastiveTrainingArguments, tasks: dict[str, Task]) -> None:
    """Raise InputError if early stopping has no evaluations to depend on, or if the best model would not be kept."""
    if patience is None:
        return
    flag = f"--early_stopping_patience {patience}"
    if not tasks:
        raise InputError(f"{flag} needs an evaluation set; give --eval_file FILE or --eval_sts_file NAME=FILE")
    if args.eval_strategy == "no" or not args.load_best_model_at_end:
        raise InputError(
            f"{flag} needs evaluations during the training, and the best model at the end; give --eval_strategy steps "
            "--eval_steps 100 --save_strategy steps --save_steps 100 --load_best_model_at_end"
        )


def pair_up(rows: Rows, positive: PositiveArguments, model_args: ModelArguments, args: ContrastiveTrainingArguments) -> Rows:
    """Make rows of anchor and positive from rows of a single text."""
    kind, _ = parse_positive(positive.positive)
    if kind in WITHOUT_ROWS:
        return rows
    if not isinstance(rows.data, Dataset):
        raise InputError(
            f"--positive {kind} needs a single dataset of sentences; give --train_file or --dataset_name, not --sources"
        )
    model = positive.fill_model or model_args.model_name_or_path or str(QUICKSTART / "encoder")
    with args.main_process_first(desc="positives"), hidden_bars(bool(args.disable_tqdm)):
        pairs = add_positives(
            rows.data, positive.positive, args.seed, rows.name, positive.synonyms, model, model_args.trust_remote_code
        )
    return rows._replace(data=pairs)


def settled(args: ContrastiveTrainingArguments, **values: Any) -> ContrastiveTrainingArguments:
    """Return a copy with some other values. They are not checked again, because the checks would derive further values."""
    changed = copy.copy(args)
    vars(changed).update(values)
    return changed


def without_evaluation(args: ContrastiveTrainingArguments) -> ContrastiveTrainingArguments:
    """Return a copy of the arguments without evaluation. Print a warning if the arguments ask for evaluation."""
    asked = args.eval_strategy != "no" or args.eval_steps or args.eval_delay or args.metric_for_best_model
    if is_first_process() and asked:
        logger.warning("no --eval_... NAME=PATH is given: nothing is evaluated, and the last model is kept, not the best one")
    nothing = {"eval_strategy": IntervalStrategy.NO, "do_eval": False, "eval_steps": None, "load_best_model_at_end": False}
    return settled(args, **nothing)


def read_train_rows(data: DataArguments) -> tuple[Dataset | list[Source], str]:
    """Read the training rows, from one dataset or from several sources. Return the rows and their name in messages."""
    given = [flag for flag in DATA_FLAGS if getattr(data, flag)]
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]} are both given; give one")
    if data.sources:
        if not data.eval_file and (data.columns or data.ignore_columns or not data.quoting):
            raise InputError(
                "--columns, --ignore_columns and --no_quoting do not apply to --sources; set them in the sources file"
            )
        return read_sources(data.sources), data.sources
    if data.dataset_name:
        rows, name = read_hub(data.dataset_name, data.dataset_config, data.dataset_split), data.dataset_name
    else:
        file = data.train_file or ""
        rows, name = read_file(file, quoting=data.quoting), masked(file)
    ignored = data.ignore_columns
    if ignored and data.eval_file:
        held_out = column_names(read_file(data.eval_file, quoting=data.quoting))
        ignored = [column for column in ignored if column in column_names(rows) or column not in held_out]
    return named_columns(leave_out(rows, ignored, name), data.columns, name), name


def read_held_out(data: DataArguments) -> Task:
    """Read the rows of `--eval_file` in the same way as those of `--train_file`.

    A column to ignore may be in only one of the two files. With `--sources` or the built-in texts, the flags about columns
    apply to the rows of `--eval_file` only. `--columns text=COLUMN` never applies to them, because single texts cannot be held
    out.
    """
    file = data.eval_file or ""
    rows, name = cast(Dataset, read_file(file, quoting=data.quoting)), masked(file)
    alone = not (data.train_file or data.dataset_name)
    ignored = [column for column in data.ignore_columns if alone or column in rows.column_names]
    columns = [] if "text" in read_columns(data.columns) else data.columns
    rows = named_columns(leave_out(rows, ignored, name), columns, name)
    task = as_task(rows, name)
    if not isinstance(task, HeldOut):
        raise InputError(f"--eval_file {name}: the columns are those of an STS set; give it by --eval_sts_file NAME=PATH")
    return task
