"""Loading of the model that a plan names, with the dropout, LoRA adapters and heads that the flags ask for."""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, TaskType
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_embed.adapters import with_new_adapters
from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint.load import MOST_TOKENS, base_of_adapter, find_transformer, load_tokenizer, read_config
from hf_embed.checkpoint.load import load_model as load_backbone
from hf_embed.checkpoint.model_files import Files
from hf_embed.checkpoint.settings import read_settings
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError, listed
from hf_embed.evaluation.tasks import Embed
from hf_embed.hub_access import find_model
from hf_embed.kit.plan import QUICKSTART, ModelArguments, Plan, settled
from hf_embed.pooling import uses_pooler
from hf_embed.training.inputs import load_to_train

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "embedding_dropout",
            "mlp_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop")  # fmt: skip
ENCODER_SETTINGS = ("pooling", "max_length", "normalize")


class LoadedModel(NamedTuple):
    """A model, its tokenizer, and the training arguments.

    A masked language model cannot hold the settings of its folder, such as the pooling. The training arguments hold them.
    """

    model: PreTrainedModel | Encoder
    tokenizer: PreTrainedTokenizerBase
    args: ContrastiveTrainingArguments


def load_model(plan: Plan) -> LoadedModel:
    """Load the model of a plan in float32, with the dropout, the LoRA adapters and the MLP head that the flags ask for.

    The model is an Encoder with the settings of its folder. With `mlm_weight`, it is the masked language model instead.

    Raises:
        InputError: if the model cannot be loaded as the flags ask, or if both LoRA and `mlm_weight` are asked for.
    """
    model_args, args, masked_lm = plan.model_args, plan.args, plan.objective.mlm_weight > 0
    name = model_args.model_name_or_path or str(QUICKSTART / "encoder")
    set_seed(args.seed)
    kwargs: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": model_args.trust_remote_code}
    if model_args.attn_implementation:
        kwargs["attn_implementation"] = model_args.attn_implementation
    if model_args.load_in_4bit:
        kwargs["quantization_config"] = four_bits()
    if model_args.dropout is not None:
        kwargs["config"] = with_dropout(name, model_args.dropout, model_args.trust_remote_code)
    if masked_lm and model_args.lora_r:
        raise InputError(
            "--lora_r and --mlm_weight cannot be combined, because the masked-language-modeling loss trains all weights; "
            "remove one of them"
        )
    if masked_lm:
        return load_masked_lm(name, args, kwargs)
    encoder = load_to_train(name, args, **kwargs)
    if model_args.lora_r:
        add_adapters(encoder, model_args)
    return LoadedModel(encoder, encoder.tokenizer, args)


def four_bits() -> BitsAndBytesConfig:
    """Return the quantization of QLoRA (https://arxiv.org/abs/2305.14314): NF4, with quantized scales.

    Products are computed in float32, or under autocast in bfloat16 (--bf16), so that the saved float32 weights give the same
    vectors. The pooler is not quantized, because it may be trained as a whole.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["pooler"],
    )  # fmt: skip


def load_masked_lm(name: str, args: ContrastiveTrainingArguments, kwargs: dict[str, Any]) -> LoadedModel:
    """Load a masked language model. The auxiliary loss trains its head.

    Raises:
        InputError: if the weights are incomplete, or if the folder has settings that would be lost.
    """
    found = find_model(name)
    folder: dict[str, Any] = find_transformer(name, **found) | found
    if base := base_of_adapter(Files(name, **folder)):
        raise InputError(
            f"--mlm_weight: '{name}' is an adapter of '{base}', and has no head for masked words; give a masked language model"
        )
    tokenizer = load_tokenizer(name, kwargs["trust_remote_code"], **folder)
    model, missing = load_backbone(name, "AutoModelForMaskedLM", **folder, **kwargs)
    if missing := [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]:
        raise InputError(
            f"model '{name}': its weights file lacks {listed(missing, 1)}, which would be random; give another model"
        )
    own = read_settings(name, cast(PreTrainedModel, model.base_model), tokenizer, args.pooling, **found)
    if own.get("max_length", 0) > MOST_TOKENS:
        del own["max_length"]
    kept = (*ENCODER_SETTINGS, "prompts")
    if lost := [key for key, value in own.items() if key not in kept and value not in (None, [], "cosine")]:
        raise InputError(f"--mlm_weight: the settings {', '.join(lost)} of '{name}' would be lost; give another model")
    known = [key for key in kept if own.get(key) not in (None, {})]
    args = settled(args, **{key: own[key] for key in known if getattr(args, key) is None})  # the user's values come first
    if uses_pooler(args.pooling):  # masked language models are loaded without a pooler
        model.base_model.pooler = type(model.base_model)(model.config).pooler
    return LoadedModel(model, tokenizer, args)


def with_dropout(name: str, rate: float, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the configuration of a model, and set all its dropout rates to `rate`.

    Raises:
        InputError: if the configuration has no dropout rate.
    """
    found = find_model(name)
    folder: dict[str, Any] = find_transformer(name, **found) | found
    config = read_config(name, trust_remote_code, **folder)
    known = [key for key in DROPOUTS if isinstance(getattr(config, key, None), float | int)]
    if not known:
        raise InputError(f"--dropout: {type(config).__name__} has no dropout rate to set; remove the flag")
    for key in known:
        setattr(config, key, rate)
    return config


def add_adapters(encoder: Encoder, model_args: ModelArguments) -> None:
    """Add LoRA adapters to the backbone. Raises InputError if a module cannot be adapted."""
    targets = model_args.lora_target_modules or ["all-linear"]
    check_lora_targets(encoder.backbone, targets)
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION, r=model_args.lora_r, lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout, target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=["pooler"] if uses_pooler(encoder.pooling) else None,
    )  # fmt: skip
    try:
        encoder.backbone = with_new_adapters(encoder.backbone, config)
    except (ValueError, TypeError) as error:  # for example, PEFT does not support the kind of the module
        raise InputError(f"--lora_target_modules {' '.join(targets)}: {error}") from error


def check_lora_targets(model: nn.Module, names: Iterable[str]) -> None:
    """Check that every name is the end of the name of a module. PEFT itself only checks that one of the names is.

    Raises:
        InputError: if a name matches no module.
    """
    modules = [name for name, module in model.named_modules() if not list(module.children())]
    for target in names:
        if target != "all-linear" and not any(name == target or name.endswith(f".{target}") for name in modules):
            ends = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
            raise InputError(
                f"--lora_target_modules {target}: the model has no such module; its linear layers are {', '.join(ends)}"
            )


def embed_with(encoder: Encoder) -> Embed:
    """Return a function from texts to embeddings, in the form in which evaluation tasks call it."""
    return cast(Embed, partial(encoder.encode, convert_to_tensor=True))
