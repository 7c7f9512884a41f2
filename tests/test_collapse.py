"""Tests of the measures of length collapse, compared with simple loops, and of the recipe length_collapse.py."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of, tiny_encoder

from hf_embed import InputError
from hf_embed.kit import docstrings
from hf_embed.kit.length_collapse import collapse, geometry, high_frequency, length_report, lines, plot_collapse
from hf_embed.tempscale import tempscale

WORDS = ["cat", "dog", "rain", "house", "river", "water", "table", "music", "winter", "street"]
TEXTS = [" ".join(WORDS[(i * 7 + j * (i + 1)) % 10] for j in range(5 + 6 * i)) for i in range(10)]


def test_geometry_against_pairs():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(7, 4)) + 1
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    got = geometry(vectors)
    pairs = [vectors[i] @ vectors[j] for i in range(7) for j in range(7) if i != j]
    assert got["mean_cosine"] == pytest.approx(np.mean(pairs))
    mean = vectors.mean(0) / np.linalg.norm(vectors.mean(0))
    assert got["to_mean"] == pytest.approx((vectors @ mean).mean())
    assert geometry(np.eye(5))["effective_rank"] == pytest.approx(5)
    assert geometry(np.ones((5, 4)) / 2)["effective_rank"] == pytest.approx(1)
    assert geometry(np.ones((5, 4)) / 2)["mean_cosine"] == pytest.approx(1)


@pytest.mark.parametrize("prompt", ["", "rain: "])
def test_high_frequency_against_a_loop(prompt):
    """BUG: the texts had no default prompt, and if the tokenizer pads on the left, a GPT-2 read them at other positions."""
    encoder = tiny_encoder(prompts={"d": prompt}, default_prompt_name="d")
    encoder.tokenizer.padding_side = "left"
    expected = []
    for text in TEXTS[:3]:
        ids = torch.tensor([encoder.tokenizer(prompt + text)["input_ids"]])
        states = encoder.backbone(ids, output_hidden_states=True).hidden_states
        shares = [((s[0] - s[0].mean(0)).square().sum() / s[0].square().sum()).item() for s in states]
        expected.append(shares)
    got = high_frequency(encoder, TEXTS[:3])
    assert len(got) == encoder.config.num_hidden_layers + 1
    np.testing.assert_allclose(got, np.mean(expected, axis=0), rtol=1e-5)


def test_report(tmp_path):
    encoder = tiny_encoder(max_length=48)
    report = length_report(encoder, TEXTS, (8, 16, 32, 512))
    tokens = [len(encoder.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert [row["tokens"] for row in report["cut"]] == [8, 16, 32]  # five of the ten texts have 32 tokens; too few have 48
    assert {row["texts"] for row in report["cut"]} == {sum(n >= 32 for n in tokens)}
    inside = {row["tokens"]: row["texts"] for row in report["natural"]}
    assert inside == {32: sum(16 < n <= 32 for n in tokens), 48: sum(n > 32 for n in tokens)}  # a bin needs two texts
    cut = [encoder.tokenizer.decode(encoder.tokenizer(t)["input_ids"][1:7]) for t, n in zip(TEXTS, tokens) if n >= 32]
    vectors = encoder.encode(cut)  # 6 tokens of the text and two special tokens: the length 8
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert report["cut"][0]["mean_cosine"] == pytest.approx(geometry(vectors)["mean_cosine"], abs=1e-5)
    assert encoder.max_length == 48
    prompted = length_report(tiny_encoder(max_length=48, prompts={"d": "cat "}, default_prompt_name="d"), TEXTS, (32,))
    counts = [len(encoder.tokenizer("cat " + text)["input_ids"]) for text in TEXTS]
    assert prompted["cut"][0]["texts"] == sum(n >= 32 for n in counts) > sum(n >= 32 for n in tokens)
    assert collapse(report) == report["cut"][2]["mean_cosine"] - report["cut"][0]["mean_cosine"]
    assert sum(" tokens " in line for line in lines(report)) == 5
    with tempscale(encoder.backbone, 0.5):
        other = length_report(encoder, TEXTS, (8, 16, 32, 512))
    assert other["cut"][0]["mean_cosine"] != report["cut"][0]["mean_cosine"]
    plot_collapse({"as it is": report, "0.5": other}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_too_little_text():
    encoder = tiny_encoder()
    with pytest.raises(InputError, match=r"1 text\(s\) are given, and at least 2 are needed"):
        length_report(encoder, ["the cat"])
    with pytest.raises(InputError, match="only 0 of 2 texts have 16 tokens or more; give longer texts"):
        length_report(encoder, ["the cat", "a dog"])


def test_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "recipes")
    monkeypatch.chdir(tmp_path)
    recipe = __import__("length_collapse")
    tiny_encoder().save_pretrained("model", verify=False)
    Path("texts.txt").write_text("\n".join(TEXTS) + "\n")
    argv = ["length_collapse.py", "model", "--texts", "texts.txt", "--lengths", "8", "16", "900"]
    argv += ["--temperature", "0.9", "0.5"]
    monkeypatch.setattr(sys, "argv", argv)
    recipe.main()
    out = capsys.readouterr().out
    assert "TempScale 0.5" in out and out.count("the same texts, truncated to") == 3 + 1  # three tables and the summary
    assert "\nnot measured: 900 tokens; too few texts are that long, or the model reads fewer (66)\n" in out
    assert all(f"\n  {head}  " in out for head in ("mean cosine", "uniformity", "rank", "to mean", "high freq."))
    reports = json.loads(Path("outputs/length_collapse/collapse.json").read_text())["reports"]
    assert set(reports) == {"as it is", "TempScale 0.9", "TempScale 0.5"}
    assert Path("outputs/length_collapse/collapse.png").exists()
    monkeypatch.setattr(sys, "argv", [*argv, "--temperature", "0"])
    assert "temperature is 0" in error_of(recipe.main)


def test_recipe_without_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "recipes")
    monkeypatch.chdir(tmp_path)
    recipe = __import__("length_collapse")
    monkeypatch.setattr(docstrings, "PACKAGES", ("accelerate",))  # reading all packages is slow
    monkeypatch.setattr(docstrings, "MAX_FILES", 40)
    monkeypatch.setattr(sys, "argv", ["length_collapse.py", "--max_texts", "12", "--lengths", "16", "32"])
    recipe.main()
    assert "as it is" in capsys.readouterr().out
