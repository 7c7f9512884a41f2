"""From flags and files to a `Plan`: everything that can be wrong with them is said before a model is made."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint

import hf_embed
from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.data.mixture import Source, read_sources
from hf_embed.data.sources import leave_out, read_file, read_hub
from hf_embed.errors import InputError, masked
from hf_embed.evaluation.sts import STS, read_sts
from hf_embed.evaluation.tasks import Task
from hf_embed.kit import cli
from hf_embed.kit.eval_flags import EvalArguments, read_tasks
from hf_embed.kit.positives import KNOWN, WITHOUT_ROWS, add_positives, parse_positive
from hf_embed.objectives import ImprovedContrastive, Matryoshka, SimCSE
from hf_embed.objectives.gte import DIRECTIONS
from hf_embed.ranges import COUNT, Range, check_ranges
from hf_embed.trainer_settings import check_metric

QUICKSTART = Path(hf_embed.__file__).parent / "quickstart"
TRUST = "Run the Python code that the model brings, if it has any: read it before."


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder. Default: the built-in quickstart encoder."}
    )
    dropout: float | None = field(default=None, metadata={"help": "All of the model's dropout rates. Default: its own."})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2 ..."})
    lora_r: int = field(default=0, metadata={"help": "Train LoRA adapters of this rank, merged at export. 0: all weights."})
    lora_alpha: int = field(default=32)
    lora_dropout: float = field(default=0.05)
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt. Default: every linear layer."}
    )
    save_adapter: bool = field(
        default=False, metadata={"help": "With LoRA: keep the adapters by themselves too, in OUTPUT_DIR/adapter."}
    )

    def __post_init__(self):
        rate, whole = Range(least=0, below=1), Range(least=0, whole=True)
        check_ranges(self, {"dropout": rate, "lora_r": whole, "lora_alpha": COUNT, "lora_dropout": rate})
        defaults = {name: field_.default for name, field_ in type(self).__dataclass_fields__.items()}
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if not self.lora_r and getattr(self, name) != defaults[name]:
                raise InputError(f"--{name} without --lora_r: there are no adapters; give their rank, --lora_r 16 for example")


@dataclass
class DataArguments:
    train_file: str | None = field(
        default=None, metadata={"help": "txt, csv, tsv, jsonl or parquet, gzipped or not. Default: the quickstart texts."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A Hub dataset in place of a file."})
    dataset_config: str | None = field(default=None)
    dataset_split: str = field(default="train")
    ignore_columns: list[str] = field(
        default_factory=list, metadata={"help": "Columns to leave out, for example a label beside pairs that are all positive."}
    )
    quoting: bool = field(
        default=True, metadata={"help": "In a csv file, quotes enclose a cell; without, they are part of the texts."}
    )
    sources: str | None = field(
        default=None, metadata={"help": "A YAML file of many sources in place of one; hf_embed/data/mixture.py shows it."}
    )


DATA_FLAGS = ("train_file", "dataset_name", "sources")


@dataclass
class RunArguments:
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run in the output folder."})
    seeds: str | None = field(
        default=None, metadata={"help": "1,2,3: train with each, keep the best by the evaluation sets, and report all."}
    )
    language: list[str] | None = field(default=None, metadata={"help": "For the card: of the texts, e.g. en de."})
    license: str | None = field(default=None, metadata={"help": "For the card, as the Hub writes it, e.g. apache-2.0."})
    show_searches: int = field(default=0, metadata={"help": "At the end print so many searches of each retrieval set."})

    def __post_init__(self):
        check_ranges(self, {"show_searches": Range(least=0, whole=True)})


@dataclass
class SimCSEArguments:
    temperature: float = field(default=0.05, metadata={"help": "Softmax temperature of the loss."})
    hard_negative_weight: float = field(default=0.0, metadata={"help": "Logit added to a row's own hard negatives."})
    mlm_weight: float = field(default=0.0, metadata={"help": "Weight of the masked-language-modelling auxiliary."})
    mask_other_positives: bool = field(
        default=True,
        metadata={"help": "Other positives of the same anchor are no negatives. False is the paper's form of the loss."},
    )

    def objective(self) -> SimCSE:
        return SimCSE(**vars(self))


@dataclass
class GTEArguments:
    temperature: float = field(default=0.01, metadata={"help": "Softmax temperature of the loss."})
    directions: list[str] = field(
        default_factory=lambda: list(DIRECTIONS),
        metadata={"help": "The sums in the loss: query_to_doc query_to_query doc_to_query doc_to_doc. query_to_doc alone is "
                          "the vanilla in-batch loss."},
    )  # fmt: skip
    partition_mode: str = field(
        default="joint",
        metadata={"help": "One softmax over all directions, or one per direction.", "choices": ["joint", "per_direction"]},
    )
    positive_once: bool = field(default=False, metadata={"help": "Count the positive once in the joint softmax."})
    margin: float | None = field(
        default=None, metadata={"help": "Leave out candidates that score above the positive's score less this margin."}
    )
    learn_temperature: bool = field(default=False, metadata={"help": "Train the temperature too."})
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Train these widths of the embedding too, e.g. 384 256 128 64."}
    )

    def objective(self) -> ImprovedContrastive | Matryoshka:
        settings = dict(vars(self))
        dims = settings.pop("matryoshka_dims")
        objective = ImprovedContrastive(**settings)
        return objective if dims is None else Matryoshka(objective, dims)


@dataclass
class PositiveArguments:
    positive: str = field(default="dropout", metadata={"help": f"What a sentence is paired with: {', '.join(KNOWN)}."})
    synonyms: str | None = field(default=None, metadata={"help": "Of synonym: lines of a word, a tab, its synonyms."})
    fill_model: str | None = field(default=None, metadata={"help": "Of mask_fill: a masked LM. Default: the model itself."})


@dataclass
class Plan:
    """What a run is of: all that flags and files say, read and checked."""

    model_args: ModelArguments
    run: RunArguments
    args: ContrastiveTrainingArguments
    objective: object
    rows: Dataset | list[Source]
    source: str  # the rows' name
    tasks: dict[str, Task]
    paired: bool | None = None
    more: list = field(default_factory=list)  # flags of the recipe besides
    datasets: list[str] = field(default_factory=list)  # on the Hub


def plan_simcse(
    name: str | None,
    paired: bool,
    quickstart_config: Path,
    quickstart_file: str,
    argv: list[str] | None = None,
    more: tuple = (),
) -> Plan:
    """Read and check flags and files.

    `name` is of the default output folder, None: the caller sees to the folder. `more`: other dataclasses of flags.
    """
    kinds = [ModelArguments, DataArguments, EvalArguments, RunArguments, SimCSEArguments, ContrastiveTrainingArguments]

    def preset(given: list[str]) -> str | None:  # the built-in encoder brings its settings
        return None if "model_name_or_path" in given else str(quickstart_config)

    kinds += [*([] if paired else [PositiveArguments]), *more]
    model_args, data, evaluation, run, simcse, args, *others = cli.parse(kinds, preset, argv)
    positive, objective = None if paired else others[0], simcse.objective()
    quickstart = not any(getattr(data, flag) for flag in DATA_FLAGS)
    if quickstart and model_args.model_name_or_path:
        raise InputError("nothing to train on; give --train_file FILE or --dataset_name NAME")
    if name:
        settle_output_dir(args, run, "quickstart" if quickstart else name, quickstart)

    if quickstart:
        rows, source = read_file(str(QUICKSTART / quickstart_file)), f"quickstart/{quickstart_file}"
    else:
        rows, source = read_train_rows(data)
    tasks = read_tasks(evaluation)
    if quickstart and not tasks:
        tasks = {"quickstart": STS(read_sts(str(QUICKSTART / "sts.tsv")))}
    check_metric(args, tasks)
    if positive:
        rows, paired = pair_up(rows, positive, model_args, args, source)
    return Plan(model_args, run, args, objective, rows, source, tasks, paired, others, hub_datasets(data, rows))


def pair_up(rows: Dataset, positive: PositiveArguments, model_args: ModelArguments, args, name: str) -> tuple[Dataset, bool]:
    """The rows to train on, and whether they are pairs."""
    kind, _ = parse_positive(positive.positive)
    if kind not in WITHOUT_ROWS and not isinstance(rows, Dataset):
        raise InputError(
            f"--positive {kind} is made for one set of sentences; give --train_file or --dataset_name, not --sources"
        )
    args.same_dropout_mask |= kind == "same_mask"
    model = positive.fill_model or model_args.model_name_or_path or str(QUICKSTART / "encoder")
    with args.main_process_first(desc="positives"):
        rows = add_positives(
            rows, positive.positive, args.seed, name, positive.synonyms, model, args.device, model_args.trust_remote_code
        )
    return rows, kind not in WITHOUT_ROWS


def plan_gte(name: str, offline_config: Path, offline_data: Callable, offline_model: str | None = None, argv=None) -> Plan:
    """Read and check flags and files.

    Without data of the user's, settings come from `offline_config`, and `offline_data(model)` makes the data, on every rank: it
    returns a file of sources and the evaluation sets as `--eval_retrieval_dir` takes them. The model is the user's or, without
    one, `offline_model`.
    """
    kinds = [ModelArguments, DataArguments, EvalArguments, RunArguments, GTEArguments, ContrastiveTrainingArguments]

    def preset(given: list[str]) -> str | None:
        return None if set(DATA_FLAGS) & set(given) else str(offline_config)

    model_args, data, evaluation, run, gte, args = cli.parse(kinds, preset, argv)
    objective = gte.objective()
    offline, own_model = not any(getattr(data, flag) for flag in DATA_FLAGS), bool(model_args.model_name_or_path)
    settle_output_dir(args, run, name, offline and not own_model)
    if offline:
        model_args.model_name_or_path = model_args.model_name_or_path or offline_model
        data.sources, sets = offline_data(model_args.model_name_or_path)
        evaluation.eval_retrieval_dir = sets + evaluation.eval_retrieval_dir
        if own_model and args.process_index == 0:
            print(f"no --sources, --train_file or --dataset_name: {model_args.model_name_or_path} is trained on {data.sources}")
    rows, source = read_train_rows(data)
    tasks = read_tasks(evaluation)
    check_metric(args, tasks)
    return Plan(model_args, run, args, objective, rows, source, tasks, datasets=hub_datasets(data, rows))


def on_the_hub(name: str | None) -> str | None:
    """A model's or data set's name, OWNER/NAME, if that is where it comes from."""
    files = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gz")
    named = name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(files) and not Path(name).exists()
    return name if named else None


def settle_output_dir(args: ContrastiveTrainingArguments, run: RunArguments, name: str, quickstart: bool) -> None:
    """Choose the folder, refuse one that holds another run, and find the checkpoint to resume from."""
    if args.output_dir in (None, "trainer_output"):
        args.output_dir = f"outputs/{name}"
        run.overwrite_output_dir |= quickstart  # outputs/quickstart is made anew each time
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: this is a file; name a folder")
    args.resume_from_checkpoint = args.resume_from_checkpoint or None
    if args.resume_from_checkpoint and not run.seeds:  # of several seeds each has its own
        args.resume_from_checkpoint = find_checkpoint(args.resume_from_checkpoint, folder)
    if folder.is_dir() and any(folder.iterdir()) and not (run.overwrite_output_dir or args.resume_from_checkpoint):
        raise InputError(
            f"--output_dir {folder} holds another run; go on with it by --resume_from_checkpoint, replace it by "
            "--overwrite_output_dir, or name another folder"
        )


def find_checkpoint(given: str, folder: Path) -> str:
    """The checkpoint that `--resume_from_checkpoint` names, or the newest."""
    if given in ("latest", "true", "True"):
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is None:
            raise InputError(f"--resume_from_checkpoint: no checkpoint-N folder in {folder}; leave the flag out to start")
        return last
    if not Path(given, "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {given}: no trainer_state.json there")
    return given


def read_train_rows(data: DataArguments) -> tuple[Dataset | list[Source], str]:
    """The rows to train on, of one set or of several sources, and their name in messages."""
    given = [flag for flag in DATA_FLAGS if getattr(data, flag)]
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]} are both given; give one")
    if data.sources:
        if data.ignore_columns or not data.quoting:
            raise InputError("--ignore_columns and --no_quoting are of one set; a sources file says it of each source")
        return read_sources(data.sources), data.sources
    if data.dataset_name:
        rows, name = read_hub(data.dataset_name, data.dataset_config, data.dataset_split), data.dataset_name
    else:
        rows, name = read_file(data.train_file, quoting=data.quoting), masked(data.train_file)
    return leave_out(rows, data.ignore_columns, name), name


def hub_datasets(data: DataArguments, rows) -> list[str]:
    """The names, OWNER/NAME, of what comes from the Hub."""
    names = [data.dataset_name] if data.dataset_name else [source.origin or "" for source in rows] if data.sources else []
    return sorted({name for name in names if on_the_hub(name)})
