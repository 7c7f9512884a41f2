"""Try every text model of the installed transformers, with tiny random weights.

    python benchmarks/architectures.py                      # all of them
    python benchmarks/architectures.py bert t5 xlnet --why  # some, with the message behind each refusal

A text model is a model whose forward() takes `input_ids` and no argument that only images or sounds need. Each model runs in
its own process, so a crash or a hang spoils only one row of the table. The columns:

    encode    Encoder accepts the model; its vectors are finite and differ, also for the longest text
    padding   a text has the same vector alone and in a batch with others, with each pooling
    train     the trainer's forward pass and loss equal those of texts that are encoded one by one; one step runs; every
              trained parameter gets a gradient, because DDP waits for it
    save      save_pretrained writes and verifies the folder
    loaders   Encoder and sentence-transformers load that folder, and return the vectors of the model in memory
    tempscale TempScale equals eager attention in which the input of every softmax is divided by the temperature; TempScale
              folded into the weights equals TempScale applied to the model

A cell is "right", "refused" (an InputError, whose one line says why), "WRONG" (other numbers) or "unclear" (another
exception). The exit status is 1 if any cell is WRONG or unclear. Model types without a tiny model are listed separately.
"""

import argparse
import collections
import contextlib
import copy
import functools
import inspect
import json
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import wait

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_MAPPING  # noqa: E402

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, InputError, SimCSE  # noqa: E402
from hf_embed.kit.plan import QUICKSTART  # noqa: E402
from hf_embed.tempscale import apply_tempscale, fold_tempscale, remove_tempscale  # noqa: E402

COLUMNS = ("encode", "padding", "train", "save", "loaders", "tempscale")
TOLERANCE = 1e-4  # largest allowed difference, as a share of the vector's norm
TEMPERATURE = 0.7
BAD = ("WRONG", "unclear")

# Arguments of forward() that show that a model needs more than text.
OTHER_INPUTS = {"pixel_values", "pixel_values_videos", "input_values", "input_features", "bbox", "flattened_patches"}
# Small values for the settings of a configuration, and the names of the settings that get them.
SMALL = {
    64: "hidden_size d_model n_embd dim emb_dim decoder_hidden_size word_embed_proj_dim embedding_size projection_dim "
        "intermediate_size d_ff encoder_ffn_dim decoder_ffn_dim hidden_dim n_inner ffn_dim ffn_hidden_size ffn_size "
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size lru_width pooler_hidden_size "
        "expert_ffn_hidden_size intermediate_size_mlp mamba_d_ssm d_inner mlp_hidden_size dim_ff latent_size "
        "moe_shared_expert_intermediate_size embedding_dim condition_dim hidden_size_global",
    2: "num_hidden_layers num_layers encoder_layers decoder_layers n_layer n_layers num_decoder_layers layers "
       "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_top_k num_experts_per_token top_k "
       "linear_num_key_heads linear_num_value_heads swa_num_key_value_heads num_nextn_predict_layers n_shared_experts "
       "mamba_n_groups n_groups num_shared_experts index_n_heads num_encoder_layers num_global_key_value_heads",
    4: "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads num_experts "
       "n_routed_experts num_local_experts moe_num_experts mamba_d_conv swa_num_attention_heads mamba_n_heads "
       "global_num_attention_heads num_mem_heads",
    16: "head_dim d_kv attention_head_size v_head_dim qk_head_dim linear_key_head_dim linear_value_head_dim kv_lora_rank "
        "q_lora_rank mamba_d_state state_size ssm_state_size time_step_rank index_head_dim swa_head_dim global_head_dim "
        "mamba_d_head mamba_head_dim qk_nope_head_dim rotary_dim d_head kv_channels hidden_size_per_layer_input rank",
    8: "qk_rope_head_dim sliding_window attention_window local_attention local_radius window_size",
    1: "n_group topk_group num_expert_group num_limited_groups first_k_dense_replace num_dense_layers",
}  # fmt: skip
SMALL = {name: value for value, names in SMALL.items() for name in names.split()}
TOKENS = {
    "vocab_size": 12000,
    "vocab_size_per_layer_input": 12000,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}


def rope(*sections: int) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # multi-head latent attention: as many keys as queries, rotary head size
# Further settings that some types need. None means the default of the configuration.
SPECIAL = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cosmos3_edge_text": rope(4, 2, 2),
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"num_experts_per_tok": 2, "num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": LATENT | {"head_dim": 24, "layer_types": ["indexed_attention"] * 2},
    "ernie4_5_moe": {"moe_k": 2},
    "esm": TOKENS | {"mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4v_moe_text": rope(2, 1, 1),
    "glm4v_text": rope(4, 2, 2),
    "glm5_next_text": LATENT | {"qk_rope_head_dim": 0, "head_dim": 0},
    "glm_image_text": rope(4, 2, 2),
    "glm_ocr_text": rope(4, 2, 2),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16} | rope(4, 2, 2),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": LATENT | {"qk_head_dim": None},
    "luke": {"entity_vocab_size": 20},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen2_5_vl_text": rope(4, 2, 2),
    "qwen2_vl_text": rope(4, 2, 2),
    "qwen4_exp_text": {"indexer_head_dim": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [32, 32]},
    "t5gemma": {"is_encoder_decoder": False},
    "xlstm": {"embedding_dim": 64, "num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layer_types": None, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layer_types": None, "layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
LATENT_TYPES = (
    "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear minicpm3 mistral4 "
    "mistral_large4_text youtu"
)
for kind in LATENT_TYPES.split():
    SPECIAL[kind] = LATENT | SPECIAL.get(kind, {})

OWN_TOKENIZERS = {"qwen2": "Qwen2Tokenizer", "qwen3_5_moe_text": "Qwen3_5Tokenizer"}

# Texts of different lengths. One contains the padding token literally, one is a single token.
TEXTS = [
    "Rain",
    "A cat sleeps on the warm windowsill.",
    "Nobody knows what [PAD] stands for in this short sentence.",
    "The committee, which had met twice that week without agreeing on anything at all, postponed the vote once more.",
    "Two men are playing guitars; a crowd of children listens to the music, and their parents are talking about the weather.",
    "rain and snow",
]
LONG = "The old lighthouse keeper wrote about the sea, the ships and the storms. " * 60


class Wrong(Exception):
    """Two numbers or vectors that should be equal are different."""


# ---- tiny models ----


def text_models(kinds=CONFIG_MAPPING_NAMES) -> dict[str, type]:
    """Return {model type: class} of the text models. For models like T5, the class is the encoder alone."""
    found = {}
    for kind in kinds:
        with contextlib.suppress(KeyError, ValueError, AttributeError, ImportError):  # no such class exists
            model = MODEL_MAPPING[CONFIG_MAPPING[kind]]
            model = model[0] if isinstance(model, (tuple, list)) else model
            encoder = getattr(transformers, model.__name__.removesuffix("Model") + "EncoderModel", None)
            model = encoder if hasattr(encoder, "forward") else model
            takes = set(inspect.signature(model.forward).parameters)
            if "input_ids" in takes and not OTHER_INPUTS & takes:
                found[kind] = model
    return found


def tiny_settings(defaults: dict) -> dict:
    """Return small values for the settings of a configuration, without dropout, and with at least one layer of each kind."""
    small = {}
    for key, value in defaults.items():
        if isinstance(value, dict) and (key.endswith("config") or key in ("decoder", "encoder")):
            small[key] = tiny_settings(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and ("drop" in key or "jitter" in key):
            small[key] = type(value)(0)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key in SMALL:
            small[key] = SMALL[key]
        elif key in TOKENS and (isinstance(value, int) or value is None and key != "vocab_size"):
            small[key] = TOKENS[key]
    if kinds := list(dict.fromkeys(defaults.get("layer_types") or [])):
        small["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        small |= {key: len(small["layer_types"]) for key in ("num_hidden_layers", "num_layers") if key in small}
    return small


@functools.cache
def tokenizer_for(kind: str):
    """Return the quickstart encoder's tokenizer, or a small one of the class that `AutoTokenizer` requires for this type."""
    if kind in OWN_TOKENIZERS:
        sentences = (QUICKSTART / "sentences.txt").read_text(encoding="utf-8").splitlines()[:500]
        return getattr(transformers, OWN_TOKENIZERS[kind])().train_new_from_iterator(sentences, 600, show_progress=False)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "encoder")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # not every model takes token types as BERT does
    return tokenizer


def build(kind: str, model_class: type, attention: str | None = None):
    settings = tiny_settings(CONFIG_MAPPING[kind]().to_dict()) | SPECIAL.get(kind, {})
    config = CONFIG_MAPPING[kind](**{key: value for key, value in settings.items() if value is not None})
    if attention:
        config._attn_implementation = attention
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > 2e7:
        raise MemoryError(f"{size / 1e6:.0f} million parameters with the small settings")
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():  # large enough that the vectors of texts differ; no bias stays 0
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    for module in model.modules():  # models that name a padding token set its row to 0, some when they load
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0
    return model.eval()


# ---- the columns ----


def difference(got, expected) -> float:
    """Return the largest distance of a vector in `got`, (N, D), from the expected vector, as a share of its norm."""
    got, expected = torch.as_tensor(got).detach().double(), torch.as_tensor(expected).detach().double()
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def compare(got, expected, what: str) -> None:
    apart = difference(got, expected)
    if not apart <= TOLERANCE:  # also catches NaN
        raise Wrong(f"{what}: the vectors differ by {apart:.1e} of the norm")


def alone(encoder) -> torch.Tensor:
    return torch.cat([encoder.encode([text], convert_to_tensor=True) for text in TEXTS])


def in_double(make, pooling: str = "mean"):
    """Return the encoder in float64 if the model can compute in it, so that rounding cannot hide an error."""
    with contextlib.suppress(Exception):  # some layers only work in float32, others overflow in a conversion
        encoder = make(pooling, torch.float64)
        if np.isfinite(encoder.encode(TEXTS)).all():
            return encoder
    return make(pooling)


def encode(make) -> None:
    encoder = make()
    vectors = encoder.encode([*TEXTS, LONG], convert_to_tensor=True)
    if not vectors.isfinite().all():
        raise Wrong("vectors are not finite")
    if vectors.shape[1] != encoder.dimension:
        raise Wrong(f"dimension is {encoder.dimension}, vectors are {vectors.shape[1]} wide")
    if (torch.cdist(vectors, vectors) + 1e9 * torch.eye(len(vectors))).min() < TOLERANCE * vectors.norm(dim=-1).max():
        raise Wrong("two different texts have the same vector")
    cats, dogs = make("last").encode(["Cats sleep all day.", "Dogs sleep all day."])
    if difference(cats[None], dogs[None]) <= TOLERANCE:
        raise Wrong("the last token's state does not depend on the first word: no attention is computed")


def padding(make) -> None:
    for pooling in ("mean", "last", "cls"):
        encoder = in_double(make, pooling)
        compare(encoder.encode(TEXTS, convert_to_tensor=True), alone(encoder), f"{pooling}, beside others")


def train(make) -> None:
    encoder = in_double(make)
    anchors, positives = TEXTS[::2], TEXTS[1::2]
    rows = datasets.Dataset.from_dict({"anchor": anchors, "positive": positives})
    with tempfile.TemporaryDirectory() as folder:
        args = ContrastiveTrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=len(rows), learning_rate=1e-3, max_grad_norm=0.0, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = ContrastiveTrainer(model=encoder, args=args, objective=SimCSE(temperature=0.05), train_dataset=rows)
        vectors = alone(trainer.encoder)
        model = trainer.encoder.train()
        ids = [encoder.tokenizer(text, truncation=True, max_length=encoder.max_length)["input_ids"] for text in TEXTS]
        flat = torch.tensor([token for row in ids for token in row])
        compare(model(flat, [len(row) for row in ids])["embeddings"], vectors, "training's forward pass")

        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(model, batch)
        unit = F.normalize(vectors.double(), dim=-1)
        expected = F.cross_entropy(unit[::2] @ unit[1::2].T / 0.05, torch.arange(len(rows)))
        compare(loss.view(1, 1), expected.view(1, 1), "training's loss")
        loss.backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if without and not trainer.args.ddp_find_unused_parameters:
            raise Wrong(f"DDP would wait for the gradients of {len(without)} parameters: {', '.join(without[:3])}")
        model.zero_grad()
        trainer.train()
        after = trainer.encoder.encode(TEXTS, convert_to_tensor=True)
        if not after.isfinite().all() or torch.equal(after, vectors):
            raise Wrong("after one step, the vectors are unchanged or not finite")


def save_and_load(make) -> dict[str, str]:
    """Return the cells of the columns save and loaders."""

    def load() -> None:
        expected = make().encode(TEXTS)
        compare(Encoder.from_pretrained(folder).encode(TEXTS), expected, "Encoder")
        compare(SentenceTransformer(folder, device="cpu").encode(TEXTS), expected, "sentence-transformers")

    with tempfile.TemporaryDirectory() as folder:
        saved = cell(lambda: make().save_pretrained(folder))
        return {"save": saved, "loaders": cell(load)} if saved[0] == "right" else {"save": saved}


def tempscale(make) -> str:
    encoder = make()
    plain = encoder.encode(TEXTS)
    apply_tempscale(encoder.backbone, TEMPERATURE)
    applied = encoder.encode(TEXTS)
    reference = make(attention="eager")
    with every_softmax_divided() as calls:
        expected = reference.encode(TEXTS)
    if calls:
        compare(applied, expected, "applied, against divided softmax inputs")
    if difference(applied, plain) <= TOLERANCE:
        raise Wrong("TempScale is applied, but the vectors are unchanged")
    note = "" if calls else "no softmax to compare with; "
    scaled = copy.deepcopy(encoder)
    try:
        fold_tempscale(scaled.backbone)
        compare(scaled.encode(TEXTS), applied, "folded, against applied")
    except InputError as error:
        note += f"not folded: {error}"
    remove_tempscale(encoder.backbone)
    compare(encoder.encode(TEXTS), plain, "removed, against plain")
    return note


@contextlib.contextmanager
def every_softmax_divided():
    """Divide the input of each attention softmax, (..., T, T), by the temperature. Yield the list of such calls."""
    plain, calls = (F.softmax, torch.softmax), []

    def divided(softmax):
        def call(scores, *args, **kwargs):
            if scores.dim() >= 3 and scores.shape[-1] == scores.shape[-2]:
                calls.append(scores.shape)
                scores = (scores / TEMPERATURE).clamp(min=torch.finfo(scores.dtype).min)  # keep the values of masks finite
            return softmax(scores, *args, **kwargs)

        return call

    F.softmax, torch.softmax = map(divided, plain)
    try:
        yield calls
    finally:
        F.softmax, torch.softmax = plain


# ---- the walk ----


def cell(function, *args) -> tuple[str, str]:
    """Return (word, message) of one column."""
    try:
        return "right", function(*args) or ""
    except InputError as error:
        return "refused", str(error)
    except Wrong as error:
        return "WRONG", str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "unclear", f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}:{place.lineno})"


def try_type(kind: str, model_class: type) -> dict[str, tuple[str, str]]:
    """Return {column: (word, message)}. If `encode` is refused, the other columns are left out."""

    def make(pooling: str = "mean", dtype: torch.dtype = torch.float32, attention: str | None = None):
        return Encoder(build(kind, model_class, attention).to(dtype), copy.deepcopy(tokenizer_for(kind)), pooling).eval()

    try:
        build(kind, model_class)
    except Exception as error:
        return {"built": ("no", f"{type(error).__name__}: {error}")}
    cells = {"encode": cell(encode, make)}
    if cells["encode"][0] != "refused":
        cells |= {"padding": cell(padding, make), "train": cell(train, make)}
        cells |= save_and_load(make)
        cells["tempscale"] = cell(tempscale, make)
    return cells


def work(sender, kind: str, model_class: type) -> None:
    """Try one type in this process, and send the cells through the pipe."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        sender.send(try_type(kind, model_class))


def walk(models: dict[str, type], workers: int, limit: float):
    """Run each type in its own process, and yield (type, cells, seconds) when one finishes."""
    fork, waiting, running = multiprocessing.get_context("fork"), list(models.items()), {}
    while waiting or running:
        while waiting and len(running) < workers:
            kind, model_class = waiting.pop(0)
            tokenizer_for(kind)  # fill the cache here, because a tokenizer cannot be trained in a forked process
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=work, args=(sender, kind, model_class))
            process.start()
            sender.close()  # the process then has the only open end, so the pipe closes when it dies
            running[receiver] = kind, process, time.monotonic()
        ready = wait(list(running), timeout=1)
        for receiver, (kind, process, start) in list(running.items()):
            seconds = time.monotonic() - start
            if receiver not in ready and seconds < limit:
                continue
            try:
                cells = receiver.recv() if receiver in ready else {"encode": ("unclear", f"no end after {limit:.0f} s")}
            except EOFError:
                cells = {"encode": ("unclear", "the process died")}
            process.kill()
            process.join()
            del running[receiver]
            yield kind, cells, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types, as in config.json; default: all")
    parser.add_argument("--why", action="store_true", help="print the message of each cell that has one")
    parser.add_argument("--json", metavar="FILE", help="file for all cells and messages")
    parser.add_argument("--workers", type=int, default=2, help="number of processes at a time")
    parser.add_argument("--limit", type=float, default=600, help="time limit for one type, in seconds")
    args = parser.parse_args()
    models = text_models(args.types or CONFIG_MAPPING_NAMES)
    if unknown := set(args.types) - set(models):
        parser.error(f"no text model type: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    results, not_built = {}, {}
    print(f"{'':28}" + "".join(f"{column:10}" for column in COLUMNS))
    for kind, cells, seconds in walk(models, args.workers, args.limit):
        if "built" in cells:
            not_built[kind] = cells["built"][1]
            continue
        results[kind] = cells
        words = "".join(f"{cells.get(column, ('',))[0]:10}" for column in COLUMNS)
        print(f"{kind:28}{words}{seconds:5.1f} s", flush=True)
        for column, (word, message) in cells.items():
            if message and (args.why or word in ("WRONG", "unclear")):
                print(f"    {column}, {word}: {' '.join(message.split())[:300]}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"results": results, "not built": not_built}, file, indent=1)
    return report(results, not_built)


def report(results: dict, not_built: dict) -> int:
    print(f"\n{'':12}{'right':>8}{'refused':>8}{'WRONG':>8}{'unclear':>8}")
    for column in COLUMNS:
        counts = collections.Counter(cells[column][0] for cells in results.values() if column in cells)
        print(f"{column:12}" + "".join(f"{counts[word]:8}" for word in ("right", "refused", "WRONG", "unclear")))
    for kind, why in not_built.items():
        print(f"not built: {kind}: {' '.join(why.split())[:150]}")
    bad = [f"{kind} ({column})" for kind, cells in results.items() for column, (word, _) in cells.items() if word in BAD]
    if bad:
        print(f"WRONG or unclear: {', '.join(bad)}")

    def count(columns) -> int:
        return sum(all(cells.get(column, ("",))[0] == "right" for column in columns) for cells in results.values())

    print(f"{count(COLUMNS)} of {len(results)} text architectures are right in every column, "
          f"{count(COLUMNS[:-1])} in every column but tempscale")  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
