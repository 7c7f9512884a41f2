"""A GPU that is pretended on the CPU, to find tensors on the wrong device and places where the host would wait for a GPU.

Inside `pretended_gpu()`, `tensor.to("cuda")` and `torch.zeros(3, device="cuda")` return tensors on the CPU that say that they
are on the GPU, because their memory is noted here. Operations on them give such tensors again. As on a GPU,

- an operation with a tensor on the GPU and another one on the CPU, which is not a scalar, is an error;
- whatever reads a number of the GPU, or needs one to know a shape, is a wait, and so is a copy between the devices, except a
  copy to the GPU from pinned memory with `non_blocking`.

What it cannot show: other numbers, random states, kernels that do not exist, time.
"""

import contextlib
import traceback
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _allowed_determinism_checks_to_fns

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
DEVICE = torch.Tensor.device.__get__  # what reads the attribute `device` of a tensor
# Operations that copy numbers to the host, because a shape or a number in Python depends on them.
READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "repeat_interleave", "item"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # with a mask as index, they read it
ALLOWED = {"copy_", "set_", *INDEXING}  # operations that may have tensors on both devices


class Memory(dict):
    """The memory of tensors, by its address. It is not freed, so that no address is used twice."""

    def holds(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return not tensor.is_meta and tensor.untyped_storage()._cdata in self

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            storage = tensor.untyped_storage()
            self[storage._cdata] = storage
        return tensor


class Waits(Counter):
    """How often the host waits, by place: the innermost line outside of PyTorch, as FILE: OPERATION."""

    def note(self, operation: str) -> None:
        files = [Path(frame.filename) for frame in traceback.extract_stack()]
        own = [file for file in files if file != Path(__file__) and not file.is_relative_to(Path(torch.__file__).parent)]
        self[f"{own[-1].name}: {operation}"] += 1


class Copy(torch.autograd.Function):
    """Copy a tensor to the GPU or to the CPU."""

    @staticmethod
    def forward(ctx, tensor, memory, to_gpu):
        ctx.memory, ctx.to_gpu = memory, to_gpu
        with _disable_current_modes():
            copy = tensor.detach().clone()
            return memory.add(copy) if to_gpu else copy

    @staticmethod
    def backward(ctx, gradient):
        return Copy.apply(gradient, ctx.memory, not ctx.to_gpu), None, None


class Operations(TorchDispatchMode):
    """Watches the devices of every operation, also in the backward pass."""

    def __init__(self, memory: Memory, waits: Waits):
        super().__init__()
        self.memory, self.waits = memory, waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = [tensor for tensor in tensors if self.memory.holds(tensor)]
        on_cpu = [tensor for tensor in tensors if tensor.dim() and not self.memory.holds(tensor)]
        if on_gpu and on_cpu and name not in ALLOWED:
            raise RuntimeError(
                f"{name}: shapes {[tuple(t.shape) for t in on_gpu]} on the GPU, {[*map(len, on_cpu)]} on the CPU"
            )
        masks = name in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1])
        if on_gpu and (name in READING or masks or (on_cpu and name in ALLOWED)):
            self.waits.note(name)
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found) if on_gpu else ():
            if isinstance(tensor, torch.Tensor):
                self.memory.add(tensor)
        return found


class Calls(TorchFunctionMode):
    """Answers what a tensor or PyTorch is asked about the GPU."""

    def __init__(self, memory: Memory, waits: Waits):
        super().__init__()
        self.memory, self.waits, self.pinned = memory, waits, Memory()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == DEVICE:
            return GPU if self.memory.holds(args[0]) else function(*args)
        if function in (torch.Tensor.backward, torch.autograd.backward):  # in which the modes stay
            with self:
                run, roots = torch.autograd.Variable._execution_engine.run_backward, (args[0],)
                return run(roots, (torch.ones_like(args[0]),), False, False, (), allow_unreachable=True, accumulate_grad=True)
        if function is torch.Tensor.pin_memory:
            return self.pinned.add(args[0].clone())
        if function is torch.Tensor.cpu:
            return self.moved(args[0], CPU)
        if function is torch.Tensor.to:
            return self.to(*args, **kwargs)
        if function is torch.Tensor.tolist and self.memory.holds(args[0]):
            self.waits.note("tolist")
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            if function is torch.tensor:
                self.waits.note("tensor")
            return self.memory.add(function(*args, **kwargs | {"device": CPU}))
        return function(*args, **kwargs)

    def to(self, tensor, *args, device=None, dtype=None, non_blocking=False, copy=False):
        for given in args:
            if isinstance(given, torch.Tensor):
                device, dtype = given.device, given.dtype
            elif isinstance(given, str | torch.device):
                device = given
            elif isinstance(given, torch.dtype):
                dtype = given
            elif given is True:
                non_blocking = True
        tensor = tensor if dtype is None else torch.Tensor.to(tensor, dtype)
        return tensor if device is None else self.moved(tensor, torch.device(device), non_blocking)

    def moved(self, tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        to_gpu = device.type == "cuda"
        if to_gpu == self.memory.holds(tensor):
            return tensor
        if not (to_gpu and non_blocking and self.pinned.holds(tensor)):
            self.waits.note("to")
        return Copy.apply(tensor, self.memory, to_gpu)


@contextlib.contextmanager
def pretended_gpu():
    """Yield the waits of the host inside a `with` block, in which there is a GPU."""
    memory, waits = Memory(), Waits()
    repeated = {"default": lambda tensor: tensor.shape}  # of what gradient caching repeats, PyTorch would compare the devices
    with patch.dict(_allowed_determinism_checks_to_fns, repeated), Operations(memory, waits), Calls(memory, waits):
        yield waits
