"""Sources of rows to train on: the settings of a source, its tokenized rows, and how often each of many sources is drawn.

A single table is a source without settings of its own. With many sources, a batch has rows of one source only (GTE, section
3.2). So the negatives of a row are texts of the same kind, and the model cannot tell them apart by their kind. Source i with
n_i rows and weight w_i is drawn with the probability

    p_i = w_i n_i^alpha / sum_j w_j n_j^alpha

With alpha = 0.5 and equal weights, a source of 10,000 rows is drawn ten times as often as one of 100 rows.

A YAML file can list the sources (`hf_embed.data.source_files`).
"""

import logging
import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from hf_embed.data.columns import column_names, negative_columns, take_columns
from hf_embed.data.labeled import as_pairs
from hf_embed.data.python_rows import as_rows
from hf_embed.data.scores import has_scores
from hf_embed.data.stream import Stream
from hf_embed.data.tokenization import RowTokenizer, most_texts, tokenize_table, truncated_share, warn_of_truncation
from hf_embed.errors import InputError, errors_of
from hf_embed.objectives.base import Objective, as_objective
from hf_embed.progress import hidden_bars, progress_bar
from hf_embed.ranges import ABOVE_ZERO, COUNT, Range, out_of_range

if TYPE_CHECKING:
    from hf_embed.arguments import ContrastiveTrainingArguments
    from hf_embed.encoder import Encoder

logger = logging.getLogger(__name__)


@dataclass
class Source:
    """Rows of one kind to train on.

    Args:
        name: the name in messages and logs (`loss_NAME`).
        rows: an `IterableDataset`, or rows of a kind that `hf_embed.data.python_rows` lists; their columns are those that
            `hf_embed.data.known_columns` lists.
        query_prompt, document_prompt: text to put before queries and documents; default: the prompts of the model.
        max_length: the maximum number of tokens of a text; default: that of the run.
        negatives: how many hard negatives of each row to use; default: all. A stream whose negatives are lists needs it.
        weight: a factor on how often the source is drawn.
        objective: the loss of this source's rows; default: the objective of the trainer. It cannot learn its temperature.
        size: the approximate number of rows of an `IterableDataset`.
        origin: where the rows come from, for messages.
        columns: which columns hold what, for example {"anchor": "question", "positive": "answer"}; also with "negative" (one
            column or a list), or only "text". Default: the columns are recognized by `hf_embed.data.known_columns`.

    Raises:
        InputError: if a column does not exist, the weight is not above 0, negatives or max_length is too small, there are no
            rows, the number of rows of a stream is unknown, or an argument is of another kind.
    """

    name: str
    rows: Dataset | IterableDataset
    query_prompt: str | None = None
    document_prompt: str | None = None
    max_length: int | None = None
    negatives: int | None = None
    weight: float = 1.0
    objective: Objective | Callable[..., Tensor] | None = None
    size: int | None = None
    origin: str | None = field(default=None, repr=False)
    columns: InitVar[dict[str, str | list[str]] | None] = None

    def __post_init__(self, columns: dict[str, str | list[str]] | None) -> None:
        if self.weight not in ABOVE_ZERO:
            raise InputError(f"{self.label}: the weight is {self.weight}; it must be a number above 0 (or remove the source)")
        for key, allowed in (("negatives", Range(least=0, whole=True)), ("max_length", COUNT), ("size", COUNT)):
            value = getattr(self, key)
            if value is not None and value not in allowed:
                raise InputError(f"{self.label}: {out_of_range('rows' if key == 'size' else key, value, allowed)}")
        for key in ("query_prompt", "document_prompt"):
            if not isinstance(getattr(self, key), str | None):
                raise InputError(f"{self.label}: {key} is {getattr(self, key)!r}; it must be a text, in quotes")
        if self.objective is not None and (isinstance(self.objective, type) or not callable(self.objective)):
            raise InputError(f"{self.label}: objective is {self.objective!r}; give an instance, for example CoSENT()")
        self.rows = as_rows(self.rows, self.label)
        if columns is not None:
            with errors_of(self.label):
                self.rows = take_columns(self.rows, columns)
        if isinstance(self.rows, Dataset):
            self.size = len(self.rows)
        elif self.size is None:  # the number in `rows.info` stays the same after take() and filter()
            raise InputError(
                f"{self.label}: the number of rows of a streaming dataset is unknown; give an approximate number (rows: in "
                "a sources file, Source(name, rows, size=...) in a script), or pass the dataset alone and set max_steps"
            )
        if self.size == 0:
            raise InputError(f"{self.label}: there are no rows")

    @property
    def own_objective(self) -> Objective | None:
        """The objective of this source's rows, or None for the objective of the trainer."""
        return None if self.objective is None else as_objective(self.objective)

    @property
    def label(self) -> str:
        """The name of the source in messages."""
        return f"source '{self.name}'" + (f" ({self.origin})" if self.origin else "")


TrainData: TypeAlias = Dataset | list[Source]  # what a training reads: one table, or several sources


# ---- from rows to token ids ----


def tokenize_source(
    source: Source,
    encoder: "Encoder",
    args: "ContrastiveTrainingArguments",
    objective: Objective,
    name: str | None = None,
    paired: bool | None = None,
) -> "Dataset | Stream":
    """Tokenize the table of a source, or open its stream, with the settings of the source if it has some.

    Args:
        source: the source.
        encoder: the encoder whose tokenizer, maximum length and prompts are used.
        args: the training arguments.
        objective: the objective of sources that have none of their own.
        name: the name of the rows in messages. Default: the label of the source.
        paired: see `hf_embed.data.columns.text_columns`.

    Raises:
        InputError: if a setting does not suit the model or the rows, the columns are not recognized, or a text is empty.
    """
    name = name or source.label
    tokenizer = source_tokenizer(source, encoder, objective, args.teacher)
    rows = source_rows(source, tokenizer, name, paired, args.drop_empty_rows)
    if isinstance(rows, Dataset):
        return tokenize_table(rows, tokenizer, name, paired, args.drop_empty_rows, source.negatives)
    rank, ranks, seed = args.process_index, args.world_size, data_seed(args)
    return Stream(source, tokenizer, rank, ranks, seed, args.shuffle_buffer_size, args.drop_empty_rows)


def source_tokenizer(source: Source, encoder: "Encoder", objective: Objective, teacher: str | None) -> RowTokenizer:
    """Return the tokenizer of a source's rows, with the maximum length and the prompts of the source if it sets them.

    If the objective needs scores, they are read from the columns of the rows. If there are none, or if the objective needs
    vectors, the tokenized rows keep their texts for the teacher.

    Args:
        source: the source.
        encoder: its tokenizer is used, and its maximum length and prompts are the defaults.
        objective: the objective of sources that have none of their own.
        teacher: the name of the teacher, if there is one.

    Raises:
        InputError: if a setting does not suit the model.
    """
    max_length = source.max_length or encoder.max_length
    if max_length > encoder.max_length:
        raise InputError(
            f"{source.label}: max_length {max_length} is larger than {encoder.max_length}, the one of the run; lower it"
        )
    own = {"query": source.query_prompt, "document": source.document_prompt}
    query, document = (encoder.prompts.get(key, "") if prompt is None else prompt for key, prompt in own.items())
    needs = (source.own_objective or objective).needs
    scored = "scores" in needs and (teacher is None or has_scores(column_names(source.rows)))
    keeps_texts = any(need != "scores" or not scored for need in needs)
    with errors_of(source.label):
        return RowTokenizer(encoder.tokenizer, max_length, query, document, scored, keeps_texts)


def source_rows(
    source: Source, tokenizer: RowTokenizer, name: str, paired: bool | None, drop_empty_rows: bool
) -> Dataset | IterableDataset:
    """Return the rows of a source, with labeled pairs as positives and negatives.

    `tokenizer` says whether the scores of the rows are read; for the other arguments, see `hf_embed.data.labeled.as_pairs`.

    Raises:
        InputError: if the setting `negatives` or streaming does not suit the rows, or labeled pairs cannot be read.
    """
    rows = source.rows if tokenizer.scored else as_pairs(source.rows, name, paired, drop_empty_rows)
    if source.negatives and not negative_columns(column_names(rows)):
        raise InputError(f"{name}: negatives is {source.negatives}, but there is no column of negatives; remove this setting")
    if not isinstance(rows, Dataset) and (tokenizer.scored or tokenizer.keeps_texts):
        raise InputError(
            f"{name}: a streaming dataset cannot have scores or a teacher, because both belong to stored rows; remove "
            "streaming: true"
        )
    return rows


def has_several_positives(table: Dataset | Stream) -> bool:
    """Return whether tokenized rows hold the hashes of other positives."""
    return table.several_positives if isinstance(table, Stream) else "other_ids" in table.column_names


def row_width(table: Dataset | Stream) -> int:
    """Return the number of texts in the largest tokenized row. A single text counts as two: it is its own positive."""
    return table.texts_per_row if isinstance(table, Stream) else max(2, most_texts(table))


def data_seed(args: "ContrastiveTrainingArguments") -> int:
    """Return the seed for the order of the rows."""
    return args.seed if args.data_seed is None else args.data_seed


# ---- many sources ----


class Mixture(torch.utils.data.Dataset):
    """Rows of several sources, read by (source, row) pairs from `SourceBatchSampler`. Each row has the index of its source."""

    def __init__(self, sources: list[Source], tables: list[Dataset | Stream], alpha: float):
        self.names, self.labels = [source.name for source in sources], [source.label for source in sources]
        self.objectives = [source.own_objective for source in sources]  # None: the objective of the trainer
        self.tables, self.sizes = tables, [len(table) for table in tables]
        self.streams = frozenset(i for i, table in enumerate(tables) if isinstance(table, Stream))
        self.texts_per_row = list(map(row_width, tables))
        logs = [math.log(source.weight) + alpha * math.log(size) for source, size in zip(sources, self.sizes)]
        self.probabilities = torch.tensor(logs, dtype=torch.float64).softmax(0).tolist()

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> list[dict]:
        source = pairs[0][0]
        return [row | {"source": source} for row in self.tables[source].__getitems__([number for _, number in pairs])]

    def __str__(self) -> str:
        width = max(map(len, self.names))
        rows = zip(self.names, self.sizes, self.probabilities)
        return "\n".join(
            f"{name:{width}}  {size:12,} rows  {probability:7.2%} of the batches" for name, size, probability in rows
        )


def make_mixture(
    sources: list[Source], encoder: "Encoder", args: "ContrastiveTrainingArguments", objective: Objective
) -> Mixture:
    """Tokenize the tables of the sources and open their streams, with the settings of `args`.

    `objective` is the objective of sources that have none of their own.

    Raises:
        InputError: if anything is wrong with a source. The message names the source.
    """
    check_sources(sources)
    tables, truncated = [], {}
    for source in progress_bar(sources, desc="Tokenizing sources", unit="source"):
        with hidden_bars():  # none for each of many sources
            table = tokenize_source(source, encoder, args, objective)
        check_size(source, len(table), args)
        tables.append(table)
        truncated[source.name] = table.truncated_share if isinstance(table, Stream) else truncated_share(table)
    warn_of_truncation(truncated)
    return Mixture(sources, tables, args.source_alpha)


def check_sources(sources: list[Source]) -> None:
    """Check that there is at least one source, and that the names of the sources differ."""
    names = [source.name for source in sources]
    if not names:
        raise InputError("there is no source to train on; list at least one")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise InputError(f"two sources are named '{twice[0]}'; rename one of them")


def check_size(source: Source, rows: int, args: "ContrastiveTrainingArguments") -> None:
    """Check that a source fills at least one global batch. If not, raise InputError or warn, as `args.small_sources` says."""
    global_batch = args.per_device_train_batch_size * args.world_size
    if rows < global_batch:
        short = f"{source.label}: there are {rows} rows, fewer than the {global_batch} rows of a global batch"
        if args.small_sources == "refuse":
            raise InputError(f"{short}; set small_sources to repeat, or use a smaller batch")
        logger.warning(f"{short}; a row can occur several times in a batch (but never as its own negative)")
