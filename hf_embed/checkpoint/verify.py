"""Check a saved folder: every loader must give the weights and the vectors of the encoder in memory."""

import copy
import gc
import importlib.util
import tempfile
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_embed.adapters import has_adapters, in_4_bits, merged_shape
from hf_embed.checkpoint.load import check_buffers, own_config
from hf_embed.checkpoint.settings import read_settings
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.forward.check import TEXTS, undisturbed, without_flash
from hf_embed.pooling import POOLINGS, pool, saved_pooling
from hf_embed.progress import silent_libraries
from hf_embed.text_models import is_remote, loaded_classes, loading_class

Encode = Callable[[list[str]], Tensor]  # from N texts to their vectors (N, D), on the CPU
# The largest allowed difference between two vectors, as a share of their norm.
TOLERANCE = 1e-5
OTHER_DEVICE_TOLERANCE = 1e-4  # a CPU rounds differently than a GPU
HALF_TOLERANCE = 1e-2  # for single texts; sentence-transformers also pools in half precision
# A text on which tokenizers differ that agree on English: accents, Chinese letters, numbers, symbols, invisible characters.
UNUSUAL = "Naïve ÄRGER in İstanbul, 東京 12345 abc678, ﬁ, 😀; don't\u200b a\u00a0b\t c."


class ExportError(RuntimeError):
    """The saved folder would not give the same weights or vectors as the encoder."""


def verify_folder(encoder: Encoder, folder: str, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that `folder` gives the model that was meant to be saved. `tokenizer` is the one that was loaded from it.

    The tensors must equal `weights` bit for bit. AutoModel and sentence-transformers (if installed) must give the encoder's
    vectors to within 1e-5 of their norm, for single texts and for a batch of texts with different lengths. In half precision,
    only single texts are checked, to within 1e-2. A model that does not fit beside the encoder is loaded on the CPU, where
    1e-4 is allowed.

    Raises:
        ExportError: if one of these checks fails.
    """
    half = encoder.dtype in (torch.float16, torch.bfloat16)
    batches = [[text] for text in TEXTS] + ([] if half else [TEXTS])
    loaders: dict[str, Callable[[torch.device], Encode]] = {
        "AutoModel": lambda device: through_automodel(encoder, folder, weights, tokenizer, device)
    }
    if importlib.util.find_spec("sentence_transformers"):
        loaders["SentenceTransformer"] = lambda device: through_sentence_transformers(encoder, folder, device)
    with undisturbed(encoder), without_flash(encoder.backbone):  # as the loaded models compute: exactly
        expected = [torch.as_tensor(encoder.encode(texts, convert_to_tensor=True)).cpu() for texts in batches]
        for loader, load in loaders.items():  # one after the other, because the encoder and its optimizer fill the memory
            found, device = vectors_through(load, batches, encoder.device)
            tolerance = HALF_TOLERANCE if half else TOLERANCE if device == encoder.device else OTHER_DEVICE_TOLERANCE
            for vectors, wanted in zip(found, expected):
                check_vectors(vectors, wanted, tolerance, loader, encoder)
    if encoder.device != torch.device("cpu"):
        gc.collect()  # the model of sentence-transformers refers to itself, so it would stay in the memory of the GPU


def check_vectors(found: Tensor, expected: Tensor, tolerance: float, loader: str, encoder: Encoder) -> None:
    """Raise ExportError if one of the vectors `found`, (N, D), differs by more than `tolerance` of its norm from `expected`.

    `loader` is what the message calls the model that gives `found`. The vectors of `encoder` are expected.
    """
    difference = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    if not difference <= tolerance:  # also catches NaN
        raise ExportError(
            f"not saved: {loader} gives vectors that differ by {difference:.1e} of their norm from those of the trained model "
            f"(pooling {encoder.pooling}, {type(encoder.base).__name__}); tolerance {tolerance:.0e}"
        )


def vectors_through(
    load: Callable[[torch.device], Encode], batches: list[list[str]], device: torch.device
) -> tuple[list[Tensor], torch.device]:
    """Load a model and encode batches of texts with it. Return the vectors, and where they were computed.

    That is `device`, or the CPU if `device` has no memory for another model.
    """
    try:
        encode = load(device)
        return [encode(texts) for texts in batches], device
    except torch.OutOfMemoryError:
        if device == torch.device("cpu"):
            raise
    return vectors_through(load, batches, torch.device("cpu"))


def verify_full_copy(full: Encoder, encoder: Encoder) -> None:
    """Check that a copy in float32 of an encoder in 4 bits gives its vectors, as closely as their devices compute.

    Raises:
        ExportError: if a vector differs by more than 1e-2 of its norm.
    """
    for text in TEXTS:
        found, expected = (torch.as_tensor(each.encode([text], convert_to_tensor=True)).cpu() for each in (full, encoder))
        check_vectors(found, expected, HALF_TOLERANCE, "the copy in float32 of the model in 4 bits", encoder)


def through_automodel(
    encoder: Encoder, folder: str, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Encode:
    """Return a function that encodes texts as the model card tells users to do it.

    Raises:
        ExportError: unless the model has exactly the tensors `weights`, bit for bit.
    """
    with silent_libraries():
        loader = getattr(transformers, loading_class(encoder.config))
        model = loader.from_pretrained(folder, dtype=encoder.dtype, trust_remote_code=encoder.remote_code)
    loaded = model.state_dict()
    for name, tensor in weights.items():
        if name not in loaded or not torch.equal(loaded[name], tensor.to(loaded[name].device)):
            raise ExportError(f"not saved: the saved tensor '{name}' differs from the trained one ({type(model).__name__})")
    model = model.to(device).eval()
    pooling = POOLINGS[saved_pooling(encoder.pooling)]
    dense = read_settings(folder, model).get("dense", [])

    @torch.inference_mode()
    def encode(texts: list[str]) -> Tensor:
        texts = [encoder.prompt() + text for text in texts]
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        output = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        if pooling.model_pooler:
            vectors = output.pooler_output
        else:
            layers = (output[0],) if pooling.layers is None else output.hidden_states
            vectors = pool(pooling.name, layers, batch["attention_mask"])
        for layer in dense:
            vectors = layer(vectors)
        return encoder.finish(vectors.float()).cpu()

    return encode


def through_sentence_transformers(encoder: Encoder, folder: str, device: torch.device) -> Encode:
    """Return a function that encodes texts with sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    settings = {"dtype": encoder.dtype}
    with silent_libraries():
        model = SentenceTransformer(folder, device=str(device), trust_remote_code=encoder.remote_code, model_kwargs=settings)
    return lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=False).float().cpu()


def verify_loadable(encoder: Encoder) -> None:
    """Check that a saved folder would load as the same model and tokenizer.

    This check runs before training, so that a long run does not end with a model that cannot be loaded.

    Raises:
        InputError: as `load_and_check_tokenizer`, `verify_layers` and `check_buffers` do.
    """
    base = encoder.base
    if is_remote(base) and base.dtype == torch.float32:
        check_buffers(type(base).__name__, base, lambda dtype: type(base)(copy.deepcopy(base.config)))
    with tempfile.TemporaryDirectory() as folder, silent_libraries():
        own_config(encoder.base).save_pretrained(folder)
        encoder.tokenizer.save_pretrained(folder)
        load_and_check_tokenizer(encoder, folder)
        verify_layers(encoder, AutoConfig.from_pretrained(folder, trust_remote_code=encoder.remote_code))


def load_and_check_tokenizer(encoder: Encoder, folder: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `folder`, to which `encoder` was saved. Check that the same model and tokenizer are loaded.

    AutoModel and AutoTokenizer choose a class by the configuration, whatever class was saved.

    Raises:
        InputError: if the model or the tokenizer would load as another class, or if the model needs a processor.
    """
    trusted = {"trust_remote_code": encoder.remote_code}  # its code is already running
    with silent_libraries():
        try:
            config = AutoConfig.from_pretrained(folder, **trusted)
            # sentence-transformers loads a processor. For a text model, that is the tokenizer.
            tokenizer = AutoProcessor.from_pretrained(folder, **trusted)
        except Exception as error:
            AutoTokenizer.from_pretrained(folder, **trusted)  # raises if the tokenizer is what cannot be loaded
            raise InputError(
                f"{type(encoder.base).__name__} needs a processor beside its tokenizer ({type(error).__name__}); "
                "use a text model"
            ) from error
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # a processor of texts and something else
            tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
        checked_class(encoder.base, config)
        verify_tokenizer(encoder, tokenizer)
    return tokenizer


def checked_class(base: PreTrainedModel, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the model that transformers would make from `config`. Raise InputError unless `base` is one."""
    loader, classes = loading_class(config), loaded_classes(config)
    if not isinstance(base, tuple(classes)) and not getattr(config, "auto_map", None):
        named = " or ".join(model_class.__name__ for model_class in classes) or "nothing"
        raise InputError(
            f"{type(base).__name__} could not be loaded after it is saved, because {loader} would make {named} from its "
            f"configuration; use a model that {loader}.from_pretrained returns"
        )
    return next((kind for kind in classes if isinstance(base, kind)), type(base))


def verify_layers(encoder: Encoder, config: PreTrainedConfig) -> None:
    """Raise InputError unless a model that is made from `config` has the weights that would be saved.

    It has others if layers were removed, added, replaced or shared in Python, but not in the configuration.
    """
    backbone = encoder.backbone
    if in_4_bits(backbone) or any(hasattr(parameter, "ds_id") for parameter in backbone.parameters()):
        return  # in memory, the shapes are not those that are saved
    base = merged_shape(backbone) if has_adapters(backbone) else encoder.base
    weights = base.state_dict()
    with torch.device("meta"), without_flash(backbone):  # no model with flash attention is made on a machine without it
        made = checked_class(base, config)(copy.deepcopy(config)).state_dict()
    # A part that is None, such as a pooler that was left out, may be missing.
    missing = [name for name in made if name not in weights and getattr(base, name.split(".")[0], None) is not None]
    other = [name for name in weights if name not in made or weights[name].shape != made[name].shape]
    if missing or other:
        name = (missing or other)[0]
        kept = "with" if missing else "with another shape of" if name in made else "without"
        problem = f"its configuration is of a model {kept} '{name}'"
        mend = "change the configuration with the layers (num_hidden_layers, for example)"
    else:
        try:
            remove_tied_weights_from_state_dict(weights, base)
            return
        except RuntimeError:
            problem, mend = "layers share weights that its class keeps apart", "give each layer its own (copy.deepcopy)"
    raise InputError(
        f"{type(base).__name__} could not be loaded after it is saved: {problem}; {mend}, or use the model as from_pretrained "
        "returns it"
    )


def verify_tokenizer(encoder: Encoder, loaded: PreTrainedTokenizerBase) -> None:
    """Raise InputError unless `loaded`, the saved and loaded tokenizer, gives the same tokens as the encoder's own."""
    for text in [*TEXTS, UNUSUAL, " ".join(encoder.tokenizer.all_special_tokens)]:
        if loaded(text)["input_ids"] != encoder.tokenizer(text)["input_ids"]:
            raise InputError(
                f"the tokenizer ({type(encoder.tokenizer).__name__}) returns other tokens after it is saved with a "
                f"{type(encoder.base).__name__} and loaded by AutoTokenizer ({type(loaded).__name__}); use the model's own "
                "tokenizer, as from_pretrained returns it"
            )
