"""The script benchmarks/architectures.py, run on a selection of model types: every cell is "right" or "refused"."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from hf_embed import Encoder, InputError

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "architectures.py"
KINDS = ["bert", "roberta", "t5", "bart", "esm", "fnet", "xlnet", "mobilebert", "longformer", "qwen3", "mixtral", "mamba"]


@pytest.fixture(scope="module")
def architectures():
    spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_no_cell_is_wrong():
    done = subprocess.run([sys.executable, SCRIPT, *KINDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"of {len(KINDS)} text architectures are right in every column" in done.stdout


def test_each_word_is_found(architectures, monkeypatch):
    """The cell is WRONG if a vector depends on the other texts of its batch. Exceptions give "refused" or "unclear"."""
    model = architectures.text_models(["bert"])["bert"]

    def make(*args):
        tokenizer = architectures.AutoTokenizer.from_pretrained(architectures.QUICKSTART / "encoder")
        return Encoder(architectures.build("bert", model), tokenizer)

    def fail(error):
        raise error

    assert architectures.cell(architectures.padding, make)[0] == "right"
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, *args, **kw: encode(self, texts, *args, **kw) + len(texts))
    assert architectures.cell(architectures.padding, make)[0] == "WRONG"
    assert architectures.cell(fail, InputError("no")) == ("refused", "no")
    assert architectures.cell(fail, KeyError("x"))[0] == "unclear"
    assert architectures.report({"bert": {"padding": ("WRONG", "")}}, {}) == 1
    assert architectures.report({"bert": {"padding": ("refused", "")}}, {}) == 0
