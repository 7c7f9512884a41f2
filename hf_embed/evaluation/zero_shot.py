"""Zero-shot text classification: the predicted label is the one whose text is nearest (GTE, section 4.2).

A template such as "this is an example of {label}" turns a label into a text. No classifier is trained on the labels.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from hf_embed.data.sources import plain_rows, row_texts
from hf_embed.errors import InputError
from hf_embed.evaluation.geometry import ordered, unit
from hf_embed.evaluation.rows import as_list, is_number, read_layout
from hf_embed.evaluation.tasks import Embed, EvaluationTask, embed_on_all_ranks, unranked
from hf_embed.files.read_files import read_json

logger = logging.getLogger(__name__)


@dataclass
class ZeroShot(EvaluationTask):
    """Texts, whose labels are predicted from the texts of the labels.

    Args:
        texts: the texts to classify.
        labels: for each text the index of its label in `label_texts`.
        label_texts: a text for each label, such as "this is an example of sport".
    """

    texts: list[str]
    labels: list[int]
    label_texts: list[str]

    kind = "zero_shot"
    main = "accuracy"
    reported = ("accuracy", "f1")

    def __post_init__(self) -> None:
        self.texts, self.label_texts = (as_list(texts, "ZeroShot") for texts in (self.texts, self.label_texts))
        numbers = as_list(self.labels, "ZeroShot: labels")
        allowed = range(len(self.label_texts))
        fits = all(isinstance(number, Integral) and number in allowed for number in numbers)
        if not (fits and len(numbers) == len(self.texts) > 0):
            raise InputError(
                "ZeroShot: labels must have one number for each text, and at least one, from 0 to the number of label texts "
                "minus 1"
            )
        texts = [" ".join(str(text).split()) for text in self.label_texts]
        if twice := [text for i, text in enumerate(texts) if text in texts[:i]]:
            raise InputError(f"ZeroShot: two labels have the text {twice[0]!r}, so no model can tell them apart; make them one")

    def score(self, embed: Embed) -> dict[str, float]:
        """Return accuracy and f1 of `embed`, x 100. f1 is the mean over the labels that texts have or that are predicted.

        They are NaN, with a warning, if each text has equal cosines with all labels, or a cosine is not finite.
        """
        texts, labels = (unit(embed_on_all_ranks(part, embed)) for part in (self.texts, self.label_texts))
        cosines = texts @ labels.T  # (N, labels)
        if not ordered(cosines):
            return unranked(self.reported, f"accuracy is NaN for {len(self.texts)} texts")
        predicted, wanted = cosines.argmax(1), np.array(self.labels)
        f1 = []
        for label in np.union1d(predicted, wanted):
            hits = ((predicted == label) & (wanted == label)).sum()
            f1.append(2 * hits / ((predicted == label).sum() + (wanted == label).sum()))
        return {"accuracy": 100 * float((predicted == wanted).mean()), "f1": 100 * float(np.mean(f1))}


def read_zero_shot(path: str, template: str, labels_file: str | None = None) -> ZeroShot:
    """Read the columns label and text from a file or the Hub; see `hf_embed.evaluation.rows.read_layout`.

    Args:
        path: the file or the dataset. The labels of a `ClassLabel` column of `datasets` are its names.
        template: the text for a label's name; it contains {label}.
        labels_file: a JSON object {label: name}. Without it, the name is the label with spaces in place of underscores.

    Raises:
        InputError: if the template does not contain {label}, columns are missing, a text or label is empty, there are fewer
            than two labels, or a label has no name.
    """
    if "{label}" not in template:
        raise InputError(f"--zero_shot_template '{template}': it must contain {{label}}")
    rows = label_and_text(path)
    found = []
    for i, row in enumerate(plain_rows(rows, ["label", "text"], path), 1):
        row_texts(row, ["text"], f"{path}, row {i}")
        found.append(name_of(row["label"], rows.features["label"]))
        if not found[-1].strip():
            raise InputError(f"{path}, row {i}: there is no label; fill it in or delete the row")
    labels = sorted(set(found))
    if len(labels) < 2:
        raise InputError(f"{path}: all labels are {labels[0]}; classification needs at least two different labels")
    names = read_label_names(labels_file, labels) if labels_file else {label: label.replace("_", " ") for label in labels}
    if all(map(is_number, names.values())):
        logger.warning(
            f"{path}: the labels are numbers, such as {labels[0]}, and tell a model nothing unless the template explains them; "
            "write words, or give their texts with --zero_shot_labels NAME=FILE"
        )
    number = {label: i for i, label in enumerate(labels)}
    texts = [template.replace("{label}", names[label]) for label in labels]
    return ZeroShot(rows["text"][:], [number[label] for label in found], texts)


def name_of(label: Any, feature: Any) -> str:
    """Return the name of a label, or "" if there is no label."""
    if isinstance(feature, ClassLabel) and label is not None:
        return feature.int2str(label) if label >= 0 else ""
    return "" if label is None else str(label)


def warn_of_header(labels: list[str], path: str) -> None:
    """Warn if the first of the rows without a header looks like a header: its label alone occurs once."""
    once = [label for label, count in Counter(labels).items() if count == 1]
    if once == labels[:1]:
        logger.warning(
            f"{path}: the label '{labels[0]}' of the first row occurs only there; if this row is a header, name its columns "
            "label and text"
        )


def label_and_text(path: str) -> Dataset:
    """Read rows with exactly the columns label and text."""
    rows, named = read_layout(path, [("label", "text")])
    rows = rows.rename_columns(dict(zip(rows.column_names, ("label", "text"))))
    labels = [str(label) for label in rows["label"]]
    if not named and len(labels) > 20 and len(set(labels)) > len(labels) / 2:
        raise InputError(f"{path}: few labels occur twice; put the labels into the first column and the texts into the second")
    if not named:
        warn_of_header(labels, path)
    return rows


def read_label_names(labels_file: str, labels: list[str]) -> dict[str, str]:
    """Read the names of the labels from a JSON object. Raise InputError if a label has no name."""
    names = read_json(labels_file, name=f"--zero_shot_labels {labels_file}")
    if missing := [label for label in labels if not isinstance(names.get(label), str)]:
        raise InputError(f"--zero_shot_labels {labels_file}: there is no text for the label '{missing[0]}'; add it")
    return names
