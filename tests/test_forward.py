"""Test the forward check of an Encoder.

Models that compute one function in all code paths are accepted. All other models are refused with a message that names them.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_model
from numpy.testing import assert_allclose
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForTextEncoding,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BigBirdConfig,
    BigBirdModel,
    ConvBertConfig,
    ConvBertModel,
    DPRConfig,
    DPRQuestionEncoder,
    EsmConfig,
    EsmModel,
    FNetConfig,
    FNetModel,
    LongformerConfig,
    LongformerModel,
    LongT5Config,
    LongT5Model,
    MarianConfig,
    MarianModel,
    MarkupLMConfig,
    MarkupLMModel,
    MobileBertConfig,
    MobileBertModel,
    MraConfig,
    MraModel,
    MT5Config,
    MT5Model,
    NystromformerConfig,
    NystromformerModel,
    RoCBertConfig,
    RoCBertModel,
    RoCBertTokenizer,
    SwitchTransformersConfig,
    SwitchTransformersModel,
    T5Config,
    T5EncoderModel,
    T5Model,
    UMT5Config,
    UMT5Model,
    XLNetConfig,
    XLNetModel,
)

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, apply_tempscale
from hf_embed.forward.check import differ, measure, stated_positions

SMALL = {"vocab_size": 12000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "pad_token_id": 0, "max_position_embeddings": 66}  # fmt: skip
T5 = {"vocab_size": 12000, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
T5_KIN = {
    "t5": (T5Model, T5Config, T5),
    "mt5": (MT5Model, MT5Config, T5),
    "umt5": (UMT5Model, UMT5Config, T5),
    "longt5": (LongT5Model, LongT5Config, T5 | {"local_radius": 8}),
    "switch": (SwitchTransformersModel, SwitchTransformersConfig, T5 | {"num_experts": 2, "router_jitter_noise": 0.0}),
}
TEXTS = [
    "Rain.",
    "A cat sleeps on the warm windowsill.",
    "[PAD] padding [PAD] [PAD] in a text",
    "The vote was postponed once more.",
]


def random_model(model_class, config):
    """Make a model with random weights that are large enough to give different texts different vectors."""
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def mobile_bert(padding: float):
    """Make a MobileBert in which all numbers of the padding token's embedding are `padding`.

    MobileBert joins the embedding of each word with those of its neighbors. The neighbor of the last word is padding in a
    batch, and nothing in a text alone.
    """
    config = MobileBertConfig(**SMALL | {"embedding_size": 32, "intra_bottleneck_size": 32})
    model = random_model(MobileBertModel, config)
    model.embeddings.word_embeddings.weight.data[0] = padding
    return model


def encoder_of(model, pooling="mean", **settings):
    return Encoder(model, small_tokenizer(), pooling, **settings).eval()


def trained(encoder, texts):
    """Compute vectors as in training: a flat batch, with gradients, in chunks of a few texts."""
    rows = encoder.tokenizer(texts, truncation=True, max_length=encoder.max_length)["input_ids"]
    flat = torch.tensor([token for row in rows for token in row])
    return encoder(flat, [len(row) for row in rows], chunk_tokens=24)["embeddings"].detach().numpy()


# ---- architectures that read more than the word embeddings ----

READS_IDS = {
    # positions are counted from the token ids, and a padding token that is part of a text has no position
    "roberta": lambda: tiny_model("roberta", pad_token_id=0),
    "xlm-roberta": lambda: tiny_model("xlm-roberta", pad_token_id=0),
    # word embeddings are scaled by the share of mask tokens among the token ids
    "esm": lambda: random_model(
        EsmModel, EsmConfig(**SMALL, mask_token_id=4, token_dropout=True, position_embedding_type="rotary")
    ),
    "mobilebert": lambda: mobile_bert(padding=0.0),
    "mpnet": lambda: tiny_model("mpnet", pad_token_id=0),
}


@pytest.mark.parametrize("architecture", READS_IDS)
def test_training_computes_what_encode_computes(architecture):
    encoder = encoder_of(READS_IDS[architecture]())
    expected = np.stack([encoder.encode(text) for text in TEXTS])
    scale = np.linalg.norm(expected, axis=1, keepdims=True)
    assert_allclose(trained(encoder, TEXTS) / scale, expected / scale, atol=1e-5)
    assert_allclose(encoder.encode(TEXTS) / scale, expected / scale, atol=1e-5)


LEAKS = {
    "fnet": lambda: random_model(
        FNetModel, FNetConfig(**{k: v for k, v in SMALL.items() if k != "num_attention_heads"}, tpu_short_seq_length=66)
    ),
    "nystromformer": lambda: random_model(
        NystromformerModel, NystromformerConfig(**SMALL, num_landmarks=8, segment_means_seq_len=8)
    ),
    "mobilebert": lambda: mobile_bert(padding=1.0),
    "convbert": lambda: random_model(ConvBertModel, ConvBertConfig(**SMALL, embedding_size=32)),
}


@pytest.mark.parametrize("architecture", LEAKS)
def test_a_model_that_reads_padding_or_draws_lots_is_refused(architecture):
    message = error_of(encoder_of, LEAKS[architecture]())
    kind = type(LEAKS[architecture]()).__name__
    assert message.startswith(f"{kind}: ")
    assert "depends on the other texts of its batch, or on chance" in message


def test_the_check_sees_a_single_leak():
    """Negative control: the check finds an attention mask that one layer of an otherwise correct model ignores."""
    model = tiny_model("bert")
    layer = model.encoder.layer[1].attention.self
    inner = layer.forward
    layer.forward = lambda hidden_states, attention_mask=None, **kwargs: inner(hidden_states, None, **kwargs)
    assert "depends on the other texts of its batch" in error_of(encoder_of, model)


@pytest.mark.parametrize(("lay_out", "architecture"), [("pad_chunk", "qwen3"), ("pack", "bert")])
def test_the_check_sees_training_that_differs(lay_out, architecture, monkeypatch):
    """Negative control: the check finds tokens that training puts in the wrong place."""
    from hf_embed.forward import chunking

    right = getattr(chunking, lay_out)

    def wrong(*args, **options):
        ids, mask, *packing = right(*args, **options)
        return ids.flip(1) if torch.is_grad_enabled() else ids, mask, *packing

    monkeypatch.setattr(chunking, lay_out, wrong)
    assert "the forward pass of training differs" in error_of(encoder_of, tiny_model(architecture))


@pytest.mark.parametrize(("by", "tolerance", "found"), [(1e-3, 1e-4, True), (1e-5, 1e-4, False), (float("nan"), 1e-4, True)])
def test_differences_are_shares_of_the_norm(by, tolerance, found):
    """Small vectors count as much as large ones: an error of 30% in vectors of length 0.01 is an error of 30%."""
    vectors = 0.01 * torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    other = vectors.clone()
    other[1] += by * 0.01 * torch.nn.functional.normalize(torch.ones(8), dim=0)
    assert differ(other, vectors, tolerance) is found


def test_the_check_disturbs_nothing():
    model = tiny_model("bert").train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    Encoder(model, small_tokenizer())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


# BUG: with autocast the model was refused ("depends on the other texts of its batch"), and with inference_mode too.
@pytest.mark.parametrize("context", [torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)])
def test_an_encoder_is_made_saved_and_loaded_in_every_context(tmp_path, context):
    model, tokenizer = tiny_model(), small_tokenizer()
    with context:
        Encoder(model, tokenizer).save_pretrained(tmp_path)
        encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.packable is not None
    encoder.embed(torch.tensor([[2, 9, 3]]), torch.ones(1, 3)).sum().backward()  # it can be trained
    assert_allclose(encoder.encode(["a cat"]), Encoder(model, tokenizer).encode(["a cat"]))


def test_weights_that_are_cast_in_inference_mode_encode():
    """BUG: such weights cannot have gradients, so the model was refused: "cannot encode a text from its token ids"."""
    encoder = Encoder(tiny_model(), small_tokenizer())
    expected = encoder.encode(["a cat", "a dog sleeps"])
    with torch.inference_mode():
        found = encoder.double().encode(["a cat", "a dog sleeps"])  # as .to("cuda") does
    assert_allclose(found, expected, atol=1e-6)
    assert encoder.packable is not None


def test_weights_that_are_not_there_yet_are_left_alone():
    """While an FSDP rank waits for its weights, they are on the meta device."""
    encoder = Encoder(tiny_model("bert").to("meta"), small_tokenizer())
    assert (encoder.dimension, encoder.max_length) == (32, 66)


def test_big_bird_attends_fully_from_the_start():
    """BigBird would turn its sparse attention off for good at the first short text, and vectors of long texts would change."""
    config = BigBirdConfig(
        **SMALL | {"max_position_embeddings": 512}, attention_type="block_sparse", block_size=8, num_random_blocks=1
    )
    encoder = encoder_of(random_model(BigBirdModel, config))
    long = "the cat and the dog and the bird " * 20
    before = encoder.encode(long)
    encoder.encode("Rain.")
    assert_allclose(encoder.encode(long), before, rtol=1e-5, atol=1e-6)
    assert encoder.config.attention_type == "original_full"


# ---- what the tokenizer returns besides the token ids ----


def test_token_types_that_matter_are_refused():
    """XLNet treats its classification token as another segment. Its tokenizer says so in token_type_ids."""
    config = XLNetConfig(vocab_size=12000, d_model=32, n_layer=2, n_head=4, d_inner=64, pad_token_id=0)
    model = random_model(XLNetModel, config)
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A:0 [SEP]:0 [CLS]:2", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    message = error_of(Encoder, model, tokenizer)
    assert "depend on the tokenizer's token_type_ids" in message and "model_input_names" in message
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert Encoder(model, tokenizer).positions is None  # max_position_embeddings is -1: no limit


def test_shapes_and_sounds_of_words_are_refused(tmp_path):
    """RoCBert reads how a word looks and sounds. Its tokenizer returns this besides the token ids."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "rain", "the", "on", "sleeps", ".", ","]
    files = {"vocab.txt": "\n".join(words)}
    files |= {name: json.dumps({word: 20 - i for i, word in enumerate(words)}) for name in ("shape.json", "sound.json")}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    tokenizer = RoCBertTokenizer(*(str(tmp_path / name) for name in files))
    assert {"input_shape_ids", "input_pronunciation_ids"} <= set(tokenizer("rain"))
    sizes = {"shape_vocab_size": 30, "pronunciation_vocab_size": 30, "shape_embed_dim": 8, "pronunciation_embed_dim": 8}
    model = random_model(RoCBertModel, RoCBertConfig(**SMALL | sizes))
    message = error_of(Encoder, model, tokenizer)
    assert "depend on the tokenizer's input_pronunciation_ids, input_shape_ids" in message


def test_token_types_that_are_all_zero_are_fine():
    tokenizer = small_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer("rain")
    assert Encoder(tiny_model("bert"), tokenizer).dimension == 32


# ---- the width and the longest text are measured ----

POSITIONS = {
    "bert": (lambda: tiny_model("bert"), 66),
    "roberta": (lambda: tiny_model("roberta", pad_token_id=0), 65),  # row 0 belongs to the padding token
    "roberta-1": (lambda: tiny_model("roberta", pad_token_id=1, max_position_embeddings=514), 512),
    "longformer": (lambda: random_model(LongformerModel, LongformerConfig(**SMALL, attention_window=[8, 8])), 65),
    "qwen3": (lambda: tiny_model("qwen3"), 64),
    "t5": (lambda: random_model(T5EncoderModel, T5Config(**T5)), None),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_the_longest_text_is_measured(name):
    make, positions = POSITIONS[name]
    model = make()
    encoder = encoder_of(model)
    assert encoder.positions == positions
    if positions is None:
        return
    assert f"above the {positions} positions" in error_of(encoder_of, make(), max_length=positions + 1)
    encoder = encoder_of(model, max_length=positions)
    vector = encoder.encode("the cat and the dog " * positions)  # truncated to exactly the number of positions
    assert np.isfinite(vector).all()


def test_the_width_is_measured():
    """The hidden states of this model are wider than config.hidden_size says."""
    model = tiny_model("bert")
    model.config.hidden_size = 24
    assert encoder_of(model).dimension == 32


# ---- T5 and related models are used as encoders ----


@pytest.mark.parametrize("name", T5_KIN)
def test_t5_is_trained_saved_and_loaded_as_an_encoder(name, tmp_path):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    model_class, config_class, settings = T5_KIN[name]
    model = random_model(model_class, config_class(**settings))
    rows = Dataset.from_dict({"anchor": TEXTS, "positive": [text.upper() + " again" for text in TEXTS]})
    args = ContrastiveTrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=4,
        max_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
    )
    trainer = ContrastiveTrainer(model, args, train_dataset=rows, processing_class=small_tokenizer())
    trainer.train()
    trainer.save_model()
    expected = trainer.encoder.eval().encode(TEXTS)
    folder = str(tmp_path / "run")
    assert_allclose(Encoder.from_pretrained(folder).encode(TEXTS), expected, rtol=1e-4, atol=1e-5)
    assert_allclose(SentenceTransformer(folder, device="cpu").encode(TEXTS), expected, rtol=1e-4, atol=1e-5)
    loaded = type(trainer.encoder.backbone).from_pretrained(folder)
    for key, tensor in trainer.encoder.backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.cpu())
    card = (tmp_path / "run" / "README.md").read_text()
    assert type(loaded).__name__ in card and "AutoModel.from_pretrained" not in card
    if name in ("t5", "mt5", "umt5"):
        assert type(AutoModelForTextEncoding.from_pretrained(folder)) is type(loaded)


@pytest.mark.parametrize("name", ["t5", "switch"])
def test_a_folder_with_the_whole_t5_loads_its_encoder(name, tmp_path):
    model_class, config_class, settings = T5_KIN[name]
    model = random_model(model_class, config_class(**settings))
    model.save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(str(tmp_path))
    assert_allclose(encoder.encode(TEXTS), encoder_of(model).encode(TEXTS), rtol=1e-5, atol=1e-6)


def test_a_model_that_needs_a_processor_is_refused_before_the_training(tmp_path):
    config = MarkupLMConfig(**SMALL, xpath_unit_hidden_size=4)
    args = ContrastiveTrainingArguments(str(tmp_path), report_to="none")
    model = random_model(MarkupLMModel, config)
    message = error_of(ContrastiveTrainer, model, args, processing_class=small_tokenizer())
    assert message.startswith("MarkupLMModel needs a processor beside its tokenizer")


def test_an_attention_that_needs_another_device_is_refused():
    """Without its CUDA kernel, MRA's attention returns zeros: each token is computed by itself, and all passes agree."""
    assert "on this device (cpu) attention has no effect" in error_of(encoder_of, random_model(MraModel, MraConfig(**SMALL)))


def test_states_that_are_not_those_of_tokens_are_refused():
    """The first output of DPR is one vector per text."""
    config = DPRConfig(**SMALL, projection_dim=0)
    message = error_of(encoder_of, random_model(DPRQuestionEncoder, config))
    assert "no hidden states to pool" in message


@pytest.mark.parametrize("names", [["input_ids", "attention_mask"], ["input_ids"]])
def test_model_input_names_are_saved(tmp_path, names):
    """BUG: without a mask, nothing could be saved: KeyError at the end of the training."""
    tokenizer = small_tokenizer()
    tokenizer.model_input_names = names
    Encoder(tiny_model("bert"), tokenizer).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_input_names == ["input_ids", "attention_mask"]


def test_other_encoder_decoders_are_refused():
    bart = BartConfig(vocab_size=12000, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                      decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32)  # fmt: skip
    assert error_of(encoder_of, BartModel(bart)).startswith("BartModel is an encoder-decoder")
    marian = MarianConfig(vocab_size=12000, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                          decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0)  # fmt: skip
    assert error_of(encoder_of, MarianModel(marian)).startswith("MarianModel is an encoder-decoder")


def test_longrope_is_used_up_to_its_original_length():
    """BUG: beyond it, one long text changed the frequencies of all texts of its batch, so a short text got another vector."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 40,
            "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}  # fmt: skip
    model = tiny_model("qwen3", rope_parameters=rope, max_position_embeddings=160)
    encoder = encoder_of(model)
    assert encoder.max_length == 40
    assert "above the 40 positions" in error_of(encoder_of, model, max_length=41)
    for tables in (rope, {"full_attention": rope}, {"sliding_attention": {"rope_type": "default"}, "full_attention": rope}):
        assert stated_positions(SimpleNamespace(max_position_embeddings=160, rope_parameters=tables)) == 40
    dynamic = rope | {"rope_type": "dynamic"}  # it changes its frequencies only beyond max_position_embeddings
    assert stated_positions(SimpleNamespace(max_position_embeddings=160, rope_parameters=dynamic)) == 160
    texts = ["the old lighthouse keeper wrote about the sea " * 9, "the ships and storms"]
    assert_allclose(encoder.encode(texts)[1], encoder.encode(texts[1:])[0], rtol=1e-4, atol=1e-5)


def add_adapters(encoder: Encoder) -> None:
    encoder.backbone = get_peft_model(encoder.backbone, LoraConfig(target_modules=["query"]))


def remove_layer(encoder: Encoder) -> None:
    encoder.base.encoder.layer = encoder.base.encoder.layer[:2]


@pytest.mark.parametrize(
    "change, checks",
    [
        (lambda encoder: None, 0),
        (lambda encoder: torch.nn.init.zeros_(encoder.base.encoder.layer[0].output.dense.weight), 0),
        (lambda encoder: apply_tempscale(encoder.backbone, 0.8), 1),
        (lambda encoder: encoder.bfloat16(), 1),
        (lambda encoder: encoder.tokenizer.add_tokens(["lighthouse"]), 1),
        (lambda encoder: setattr(encoder, "pooling", "cls"), 1),
        (add_adapters, 1),
        (remove_layer, 1),
    ],
    ids=["nothing", "weights", "TempScale", "precision", "tokenizer", "pooling", "adapters", "layers"],
)
def test_checked_again_only_after_a_change(monkeypatch, change, checks):
    encoder, seen = encoder_of(tiny_model(vocab_size=3010)), []
    monkeypatch.setattr("hf_embed.encoder.measure", lambda given: seen.append(given) or measure(given))
    change(encoder)
    encoder.encode("Rain.")
    encoder.encode("Rain.")
    assert seen == [encoder] * checks
