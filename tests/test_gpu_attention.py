"""Attention in a packed row on a GPU: which kernel is called and how (on any machine), and what it computes (on a GPU)."""

import copy
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from conftest import small_tokenizer, tiny_model
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, Trainer
from transformers.masking_utils import sdpa_mask

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, SimCSE, mining
from hf_embed.errors import InputError
from hf_embed.forward import packed_attention
from hf_embed.forward.chunking import default_chunk_tokens
from hf_embed.forward.packed_attention import (
    FLASH_TOKENS,
    PADDED,
    CannotDrop,
    CannotPack,
    attend_by_text,
    attend_on_gpu,
    gpu_kernel,
)
from hf_embed.forward.packing import from_zero
from hf_embed.kit.inference import EncodingArguments, load_for_encoding, process_state
from hf_embed.library_internals import attention_backend
from hf_embed.mining import searcher

SHORT, LONG = [5, 3, 9], [70, 65, 66]  # lengths of texts, below and above `FLASH_TOKENS`
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def states(lengths, heads=4, width=16, dtype=torch.float32, device="cpu"):
    """Return (S, H, d), which requires a gradient, and depends only on the arguments."""
    random = torch.Generator().manual_seed(heads)
    made = torch.randn(sum(lengths), heads, width, generator=random, dtype=torch.float64)
    return made.to(device, dtype).requires_grad_()


def bounds_of(lengths, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def text_by_text(query, key, value, bounds, longest, dropout, scale):
    """Attend as the kernels do, with nothing but products."""
    assert longest == max(bounds.diff()) and dropout == 0 and query.shape == key.shape
    outputs = []
    for first, end in zip(bounds.tolist(), bounds.tolist()[1:]):
        q, k, v = (part[first:end].transpose(0, 1) for part in (query, key, value))
        weights = (q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def recent(monkeypatch):
    """Let this machine have a GPU that knows flash attention."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu_kernel.cache_clear()
    yield
    gpu_kernel.cache_clear()


# ---- which kernel, on any machine ----


@pytest.mark.parametrize(
    ("lengths", "dtype", "width", "expected"),
    [
        (SHORT, torch.bfloat16, 64, "efficient"),
        (LONG, torch.bfloat16, 64, "flash"),
        (LONG, torch.float16, 192, "flash"),
        (LONG, torch.float16, 200, "efficient"),  # BUG: in training, flash attention ended in an error on an RTX 4090 or L4
        (LONG, torch.float32, 64, "efficient"),
        ([FLASH_TOKENS] * 3, torch.bfloat16, 64, "efficient"),
        ([2, 3, 3 * FLASH_TOKENS], torch.bfloat16, 64, "flash"),  # the mean decides
    ],
)
def test_the_kernel_depends_on_shapes_and_precision(lengths, dtype, width, expected, recent, monkeypatch):
    for name in ("flash", "efficient"):
        monkeypatch.setattr(packed_attention, f"{name}_attention", lambda *_, name=name: name)
    query = states(lengths, width=width, dtype=dtype)
    assert attend_on_gpu(query, query, query, bounds_of(lengths), max(lengths), 0.0, None) == expected


@pytest.mark.parametrize("long", [True, False])
def test_an_older_gpu_has_no_flash_attention(long, recent, monkeypatch):
    """BUG: with bfloat16, a run ended in "cutlassF: no kernel found to launch!". PyTorch has none before Ampere."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for dtype in (torch.float16, torch.float32):
        assert gpu_kernel(torch.device("cpu"), dtype, 64, long, False) is packed_attention.efficient_attention
    assert gpu_kernel(torch.device("cpu"), torch.bfloat16, 64, long, False) is None


@pytest.mark.parametrize(
    ("works", "dtype", "width", "expected"),
    [
        (True, torch.bfloat16, 64, "efficient"),
        (True, torch.float32, 64, "efficient"),
        (False, torch.bfloat16, 64, "flash"),
        (False, torch.float16, 200, None),
        (False, torch.float32, 64, None),
    ],
)
def test_dropout_needs_a_kernel_that_has_it(works, dtype, width, expected, recent, monkeypatch):
    """BUG: short texts had dropout of kernels that, before PyTorch 2.14, drop other weights in the backward pass."""
    for name in ("flash", "efficient"):
        monkeypatch.setattr(packed_attention, f"{name}_attention", lambda *_, name=name: name)
    monkeypatch.setattr(packed_attention, "EFFICIENT_DROPOUT", works)
    query = states(SHORT, width=width, dtype=dtype)
    given = query, query, query, bounds_of(SHORT), max(SHORT), 0.1, None
    if expected is None:
        with pytest.raises(CannotDrop, match=f"{dtype} with heads of {width} numbers in a packed row"):
            attend_on_gpu(*given)
    else:
        assert attend_on_gpu(*given) == expected


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 64), (torch.float32, 12)])
def test_without_a_kernel_the_texts_are_padded(dtype, width):
    query = states(LONG, width=width, dtype=dtype)
    with pytest.raises(CannotPack, match=f"{dtype} with heads of {width} numbers"):
        attend_on_gpu(query, query, query, bounds_of(LONG), max(LONG), 0.0, None)


def test_without_a_kernel_with_dropout_only_the_training_pads(monkeypatch):
    """The check of an encoder trains in float32, where there may be no such kernel, and the training then in bfloat16."""
    texts, kinds = (torch.arange(5, 13), [4, 3, 1]), []
    alone = Encoder(tiny_model(attn_implementation="eager"), small_tokenizer())
    embed = Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda *args, **more: kinds.append(len(args) > 3) or embed(*args, **more))

    def no_dropout(shape, p):
        raise CannotDrop("dropout")

    monkeypatch.setattr(packed_attention, "draw_mask", no_dropout)
    encoder = Encoder(tiny_model(), small_tokenizer())
    assert encoder.numbering is from_zero
    kinds.clear()
    encoder.train()(*texts)
    assert kinds == [True, False]
    assert_close(encoder.eval()(*texts), alone(*texts))
    assert encoder.numbering is from_zero


def test_under_autocast_the_states_are_cast(recent, monkeypatch):
    """As PyTorch's function for padded texts does: some models add positions to query and key in float32."""
    monkeypatch.setattr(packed_attention, "efficient_attention", lambda query, key, value, *_: (query, key, value))
    query = states(SHORT)
    with torch.autocast("cpu", torch.bfloat16):
        cast = attend_on_gpu(query, query, query.bfloat16(), bounds_of(SHORT), max(SHORT), 0.0, None)
    assert {part.dtype for part in cast} == {torch.bfloat16}


@pytest.mark.parametrize("lengths", [SHORT, LONG])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_arguments_mean_what_they_mean_on_a_cpu(lengths, heads, scale, recent, monkeypatch):
    """With kernels that are plain products, attention for a GPU equals attention on a CPU, with fewer key heads too."""
    monkeypatch.setattr(packed_attention, "flash_attention", text_by_text)
    monkeypatch.setattr(packed_attention, "efficient_attention", text_by_text)
    query, key = states(lengths), states(lengths, heads)
    got = attend_on_gpu(query, key, key, bounds_of(lengths), max(lengths), 0.0, scale)
    rows = [part.transpose(0, 1).unsqueeze(0) for part in (query, key, key)]
    expected, _ = attend_by_text(torch.nn.Module(), *rows, None, scaling=scale, text_bounds=bounds_of(lengths))
    assert_close(got, expected[0])


@pytest.mark.parametrize(("lengths", "dropout"), [(SHORT, 0.0), (LONG, 0.1)])
def test_pytorch_has_the_kernels_with_a_backward_pass(lengths, dropout, recent, monkeypatch):
    """On the device "meta", which has shapes only, a renamed kernel or another order of arguments raises an error."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which does not know "meta"
    query = states(lengths, dtype=torch.bfloat16, device="meta")
    row = query.transpose(0, 1).unsqueeze(0)
    options = {"text_bounds": bounds_of(lengths, "meta"), "longest_text": max(lengths), "dropout": dropout}
    out, _ = attend_by_text(torch.nn.Module(), row, row, row, None, **options)
    assert out.shape == (1, sum(lengths), 4, 16) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert query.grad.shape == query.shape


# ---- models that are loaded on a CPU and then moved to the GPU ----


def flash_needs_a_gpu(module, query, key, value, attention_mask, **options):
    """Attend as flash attention does on a CPU."""
    raise NotImplementedError("Could not run 'flash_attn' with arguments from the 'CPU' backend")


@pytest.fixture
def flash_elsewhere():
    """Let models with flash attention be built on a machine without it."""
    right = {name: AttentionInterface()[name] for name in ("flash_attention_2", "flash_attention_3")}
    for name in right:
        AttentionInterface.register(name, flash_needs_a_gpu)
    yield
    for name, function in right.items():
        AttentionInterface.register(name, function)


def flash_model():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    return model


def flash_trainer(folder):
    rows = [{"anchor": f"a text of number {i}", "positive": f"number {i} of a text"} for i in range(8)]
    args = ContrastiveTrainingArguments(str(folder), use_cpu=True, report_to="none", pooling="mean")
    return ContrastiveTrainer(flash_model(), args, SimCSE(), rows, processing_class=small_tokenizer())


def test_a_trainer_takes_a_model_with_flash_attention_that_is_still_on_the_cpu(tmp_path, flash_elsewhere, monkeypatch):
    """BUG: it computed a few texts on the CPU, to find unused parameters. Flash attention has no kernel there."""
    # The trainer's own device is a CPU too, on this machine. Let it pass for a GPU.
    monkeypatch.setattr("hf_embed.trainer.check_kernel", lambda backbone, device: None)
    trainer = flash_trainer(tmp_path)
    assert attention_backend(trainer.encoder.config) == "flash_attention_2"
    frozen = {name for name, p in trainer.encoder.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize("run", [flash_trainer, lambda folder: Encoder(flash_model(), small_tokenizer()).encode("a")])
def test_flash_attention_on_a_cpu_is_refused_by_name(run, tmp_path, flash_elsewhere):
    """BUG: the first step, and `encode`, ended in the error of the kernel, which names neither the cause nor the mend."""
    with pytest.raises(InputError, match=r"^flash_attention_2 needs a GPU, .*\.to\(\"cuda\"\).*sdpa$"):
        run(tmp_path)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("device", [None, ["cpu", "cpu"]])
def test_neighbors_of_flash_attention_are_refused_too(name, device, flash_elsewhere):
    model = flash_model()
    model.config._attn_implementation = name
    encoder = Encoder(get_peft_model(model, LoraConfig(target_modules=["query"])), small_tokenizer())
    with pytest.raises(InputError, match=f"^{name} needs a GPU"):
        encoder.encode(["a text", "two"], device=device)


def test_an_attention_with_a_kernel_for_the_cpu_is_not_refused():
    """A kernel of another name, such as one from the Hub, may know CPUs."""
    model = tiny_model()
    expected = Encoder(copy.deepcopy(model), small_tokenizer()).encode(["a text", "two"])
    AttentionInterface.register("owner/flash-attn", PADDED)
    model.config._attn_implementation = "owner/flash-attn"
    # transformers makes no mask for an attention that it does not know.
    with pytest.raises(InputError, match="depends on the other texts"):
        Encoder(model, small_tokenizer())
    AttentionMaskInterface.register("owner/flash-attn", sdpa_mask)
    vectors = Encoder(model, small_tokenizer()).encode(["a text", "two"])  # in bfloat16, as for all flash attention
    assert_close(vectors, expected, rtol=0, atol=0.03)


def test_encode_checks_again_where_the_model_has_moved():
    """BUG: whether texts can share a row was found on the CPU, and not again on the GPU, so `encode` padded there."""
    encoder = Encoder(tiny_model(attn_implementation="eager"), small_tokenizer())
    assert encoder.numbering is None
    encoder.backbone.set_attn_implementation("sdpa")  # as another device, this can change how texts are packed
    vectors = encoder.encode(["a text", "another, longer text"])
    assert encoder.numbering is not None
    encoder.packable = None
    assert_close(vectors, encoder.encode(["a text", "another, longer text"]), rtol=1e-4, atol=1e-5)
    assert encoder.packable is None  # it has not moved since, so it was not checked again


@pytest.mark.parametrize(
    ("attention", "device", "packed"), [("sdpa", "cuda", True), ("sdpa", "mps", False), ("eager", "cuda", False)]
)
def test_a_model_that_moves_without_a_check_is_packed(attention, device, packed, monkeypatch):
    """FSDP and DeepSpeed move the model after the check, which sharded weights do not allow, and Trainer one of `model_init`.

    BUG: its texts were then padded in the whole training.
    """
    encoder = Encoder(tiny_model(), small_tokenizer())
    monkeypatch.setattr("hf_embed.forward.packing.place_of", lambda model: (attention, device))
    assert encoder.numbering is (from_zero if packed else None)


def test_a_model_of_model_init_is_checked_where_it_trains(tmp_path, monkeypatch):
    """BUG: with flash attention, which cannot be checked on the CPU, its texts were padded on the GPU."""
    checked, args = [], ContrastiveTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    rows = [{"anchor": f"a text of number {i}", "positive": f"number {i} of a text"} for i in range(8)]
    model = {"processing_class": small_tokenizer(), "model_init": lambda: tiny_model()}
    trainer = ContrastiveTrainer(None, args, SimCSE(), rows, **model)
    monkeypatch.setattr(Encoder, "check_changed", lambda encoder: checked.append(encoder))
    trainer.train()
    assert checked == [trainer.encoder]


def flash_that_rounds(module, query, key, value, attention_mask, **options):
    """Attend as flash attention does on a GPU, in half precision."""
    assert query.dtype == torch.bfloat16
    mask = None if attention_mask is None else attention_mask[:, None, None].bool()
    return PADDED(module, query, key, value, mask)


@pytest.mark.parametrize("attend", [flash_needs_a_gpu, flash_that_rounds])
def test_a_model_with_flash_attention_is_saved(tmp_path, attend, flash_elsewhere):
    """BUG: its vectors are rounded, or cannot be computed on a CPU, so they never equaled those of the saved folder."""
    AttentionInterface.register("flash_attention_2", attend)
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    encoder = Encoder(model, small_tokenizer())
    encoder.save_pretrained(str(tmp_path / "out"))
    assert attention_backend(encoder.config) == "flash_attention_2"
    again = Encoder.from_pretrained(str(tmp_path / "out"))
    assert all(torch.equal(one, again.backbone.state_dict()[name]) for name, one in model.state_dict().items())


# ---- TF32 ----


def settings_of_products():
    every = torch.backends
    levels = [every, every.cuda.matmul, every.mkldnn.matmul, every.cudnn, every.cudnn.conv, every.cudnn.rnn]
    return [level.fp32_precision for level in levels]


@pytest.fixture(params=["none", "tf32", "ieee"])
def all_products(request):
    """Set the precision of all products, as `tf32` of TrainingArguments does."""
    torch.backends.fp32_precision = request.param
    yield
    torch.backends.fp32_precision = "none"


def test_a_new_encoder_is_exact_and_leaves_the_settings_of_products(all_products, monkeypatch):
    """BUG: with tf32=True, every trainer ended in an error of PyTorch, which does not mix its two kinds of settings."""
    seen, embed = [], Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda *args, **more: seen.append(settings_of_products()) or embed(*args, **more))
    before = settings_of_products()
    Encoder(tiny_model(), small_tokenizer())
    assert settings_of_products() == before
    assert seen and all(set(each) == {"ieee"} for each in seen)


def test_tf32_can_be_set_after_the_encoder_was_made():
    """BUG: the encoder left products at full precision, so `tf32=True` changed nothing."""
    Encoder(tiny_model(), small_tokenizer())
    torch.backends.fp32_precision = "tf32"
    try:
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("value", ["ieee", "tf32"])
@pytest.mark.parametrize("of_cudnn", [False, True])
def test_a_later_setting_means_the_same_with_an_encoder(value, of_cudnn):
    """BUG: cuDNN's convolutions and RNNs kept TF32 for good, because their default was written back as a value of their own."""
    level = torch.backends.cudnn if of_cudnn else torch.backends
    seen = []
    for make in (lambda: None, lambda: Encoder(tiny_model(), small_tokenizer())):
        own = level.fp32_precision
        make()
        level.fp32_precision = value
        seen.append(settings_of_products())
        level.fp32_precision = own
    assert seen[0] == seen[1]


def test_a_folder_is_compared_exactly(tmp_path, monkeypatch, all_products):
    """Vectors in TF32 differ from each other by more than 1e-5, for example in a packed and in a padded batch."""
    seen, encode, encoder = [], Encoder.encode, Encoder(tiny_model(), small_tokenizer())
    monkeypatch.setattr(Encoder, "encode", lambda *args, **more: seen.append(settings_of_products()) or encode(*args, **more))
    encoder.save_pretrained(str(tmp_path / "out"))
    assert seen and all(set(each) == {"ieee"} for each in seen)


# ---- settings that differ on a GPU ----


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("allowed", [True, False])
def test_chunks_have_no_attention_of_cudnn(caching, allowed, monkeypatch):
    """BUG: on an H200, padded chunks waited for cuDNN, which prepares its kernels anew for each shape of a chunk."""
    seen, embed, encoder = [], Encoder.embed, Encoder(tiny_model(), small_tokenizer())
    of_cuda = torch.backends.cuda
    monkeypatch.setattr(Encoder, "embed", lambda *args: seen.append(of_cuda.cudnn_sdp_enabled()) or embed(*args))
    before = of_cuda.cudnn_sdp_enabled()
    of_cuda.enable_cudnn_sdp(allowed)
    # `torch.utils.checkpoint`, which a GPU uses
    monkeypatch.setattr("hf_embed.forward.activations.has_gradient_hook", lambda tensor: True)
    try:
        encoder(torch.arange(5, 13), [4, 3, 1], chunk_tokens=4, gradient_caching=caching)["embeddings"].sum().backward()
        assert of_cuda.cudnn_sdp_enabled() is allowed
    finally:
        of_cuda.enable_cudnn_sdp(before)
    assert seen == (4 if caching else 2) * [False]


def test_chunks_are_larger_where_all_activations_are_kept():
    assert [default_chunk_tokens(torch.device("cuda"), kept) for kept in (True, False)] == [65536, 16384]
    assert [default_chunk_tokens(torch.device("cpu"), kept) for kept in (True, False)] == [2048, 2048]


@pytest.mark.parametrize(("caching", "grad", "expected"), [(False, True, 65536), (True, True, 16384), (False, False, 16384)])
def test_the_encoder_knows_whether_activations_are_kept(caching, grad, expected, monkeypatch):
    encoder, seen = Encoder(tiny_model(), small_tokenizer()), []
    sizes = {True: 65536, False: 16384}
    monkeypatch.setattr("hf_embed.encoder.default_chunk_tokens", lambda device, kept=False: sizes[kept])
    monkeypatch.setattr("hf_embed.encoder.encode_in_chunks", lambda *args, **_: seen.append(args[4]))
    with torch.set_grad_enabled(grad):
        encoder(torch.arange(5, 9), [4], gradient_caching=caching)
    assert seen == [expected]


def test_the_launcher_chooses_the_cpu(tmp_path, monkeypatch):
    """BUG: transformers does not read this, so both processes of cpu_2.yaml took the only GPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert ContrastiveTrainingArguments(str(tmp_path), report_to="none").use_cpu
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    assert not ContrastiveTrainingArguments(str(tmp_path), report_to="none").use_cpu


@pytest.mark.parametrize(("launched", "on_cpu"), [("True", True), ("False", False), (None, False)])
def test_the_launcher_chooses_the_cpu_for_recipes_that_do_not_train(launched, on_cpu, monkeypatch):
    """BUG: encode, evaluate, mine-hard-negatives and pretrain-encoder asked for one GPU for each CPU process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("hf_embed.kit.inference.PartialState", lambda cpu, timeout: cpu)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", launched)
    assert process_state() is on_cpu


def test_encoding_and_mining_heed_the_launcher(tmp_path, monkeypatch):
    """BUG: the search for hard negatives asked for a GPU, and so did a recipe that encodes in one process."""
    Encoder(tiny_model(), small_tokenizer()).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    scores, _ = searcher([], use_faiss=False)(torch.ones(1, 2), 5)
    assert scores.device.type == load_for_encoding(str(tmp_path), EncodingArguments()).device.type == "cpu"


def test_processes_that_encode_wait_long_for_each_other(monkeypatch):
    """BUG: on GPUs, a process that had encoded its share waited 10 minutes for the others, and then ended with an error."""
    monkeypatch.setattr("hf_embed.kit.inference.PartialState", lambda cpu, timeout: timeout)
    assert process_state() >= timedelta(hours=12)


@pytest.mark.parametrize(("free", "copies"), [(999, 1), (100, 3)])
def test_documents_are_copied_to_the_gpu_once_if_they_fit(tmp_path, free, copies, monkeypatch):
    """BUG: the search for hard negatives copied them again for every 2,048 pairs, which takes longer than to compare them."""
    path = tmp_path / "000000.npy"
    path.write_bytes(bytes(200))
    made = []
    monkeypatch.setattr(mining, "on_cpu", lambda: False)
    monkeypatch.setattr(mining, "free_memory", lambda device: free)
    monkeypatch.setattr(mining, "read_shards", lambda paths, device: made.append(device.type) or iter([torch.ones(1)]))
    monkeypatch.setattr(mining, "exact_search", lambda queries, blocks, k: list(blocks))
    queries = SimpleNamespace(to=lambda device: device)
    find = searcher([path], use_faiss=False)
    assert [len(find(queries, 5)) for _ in range(3)] == [1, 1, 1]
    assert made == ["cuda"] * copies


@pytest.mark.parametrize("settings", [{}, {"nan_steps": "skip"}])
def test_losses_are_not_read_in_each_step(tmp_path, settings, monkeypatch):
    seen, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *_: seen.append(self.args.logging_nan_inf_filter) or train(self))
    rows = [{"anchor": f"a text of number {i}", "positive": f"number {i} of a text"} for i in range(8)]
    args = ContrastiveTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, **settings)
    trainer = ContrastiveTrainer(tiny_model(), args, SimCSE(), rows, processing_class=small_tokenizer())
    trainer.train()
    assert seen == [False] and trainer.args.logging_nan_inf_filter


# ---- on a GPU ----


@on_a_gpu
@pytest.mark.parametrize("lengths", [SHORT, LONG, SHORT + LONG])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_the_kernels_attend_within_texts(lengths, dtype, tolerance):
    """Output and gradients equal those of float64, text by text."""
    found = []
    for kind, device, attend in ((dtype, "cuda", attend_on_gpu), (torch.float64, "cpu", text_by_text)):
        given = states(lengths, dtype=dtype, device=device).detach().to(kind)
        query, key, value = (given.roll(i).requires_grad_() for i in range(3))
        out = attend(query, key, value, bounds_of(lengths, device), max(lengths), 0.0, None)
        out.sin().sum().backward()
        found.append([part.detach().double().cpu() for part in (out, query.grad, key.grad, value.grad)])
    for got, expected in zip(*found):
        assert (got - expected).norm() <= tolerance * expected.norm()


@on_a_gpu
@pytest.mark.parametrize("length", [9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_drop_the_same_weights_in_both_passes(length, dtype):
    """The output is linear in the values, so both products below are equal if the gradient has the masks of the output.

    Texts and heads with equal states have different outputs if each has a mask of its own.
    """
    if dtype == torch.float32 and not packed_attention.EFFICIENT_DROPOUT:
        pytest.skip("PyTorch has no such kernel with dropout")
    query, key, value = (states([length], 1, dtype=dtype, device="cuda").detach().roll(i).repeat(3, 4, 1) for i in range(3))
    out = attend_on_gpu(query, key, value.requires_grad_(), bounds_of(3 * [length], "cuda"), length, 0.1, None)
    factors = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, value, factors)
    products = [(one.double() * other.double()).sum() for one, other in ((out, factors), (value, gradient))]
    assert abs(products[0] - products[1]) <= 3e-2 * (out.double() * factors.double()).norm()
    assert not any(torch.equal(out[:length, 0], out.view(3, length, 4, -1)[text, :, head]) for text, head in [(0, 1), (1, 0)])


@on_a_gpu
def test_a_model_is_packed_on_a_gpu():
    encoder = Encoder(tiny_model(), small_tokenizer())
    texts = ["a text", "another, longer text with more words in it", "rain"]
    expected = encoder.encode(texts)
    moved = copy.deepcopy(encoder).to("cuda")
    assert_close(moved.encode(texts), expected, rtol=1e-4, atol=1e-5)
    assert moved.numbering is not None and moved.checked != encoder.checked
