"""A device that torch takes for an accelerator and that is processor memory: what mixes devices fails as on CUDA, what crosses is counted.

A tensor of `pretend:0` or `pretend:1` is a wrapper subclass around a tensor on the processor. `__torch_dispatch__` answers operations on such
tensors; a fallback for the backend's own dispatch key answers what has no such argument (`torch.zeros(3, device="pretend")`, and the inside of
`torch.tensor`) and what comes from the threads of a backward pass, where a dispatch mode would not be.
"""
import functools
from contextlib import contextmanager
from unittest.mock import patch

import torch

NAME, COUNT = "pretend", 2
MIXED = "Expected all tensors to be on the same device, but found at least two devices, {} and {}!"
ATEN = torch.ops.aten
CROSSING = {ATEN.copy_.default, ATEN._to_copy.default}
# On CUDA too, places may be told by indices on the processor.
INDEXED = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default, ATEN._index_put_impl_.default, ATEN._unsafe_index.Tensor}
# These fill a tensor of size 0 that grows, which the outside of a wrapper cannot.
RESIZING = (ATEN.arange, ATEN.linspace, ATEN.logspace, ATEN.randperm, ATEN.eye)
crossed = []  # (from, to, bytes) of every crossing while `counting`


class Pretended(torch.Tensor):
    """A tensor on `pretend:N`; `held` is the tensor of the same shape, strides and values on the processor."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, device):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
                                                   dtype=held.dtype, layout=held.layout, device=device, requires_grad=False)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return answer(op, *args, **(kwargs or {}))

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):  # torch would exchange the outside alone
        torch.Tensor.data.__set__(self, new)
        self.held = new.held

    def __repr__(self):
        return f"Pretended({self.held}, device='{self.device}')"

    def numpy(self, *, force=False):
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def __array__(self, dtype=None):
        return self.numpy()

    def untyped_storage(self):  # by which transformers finds tied weights
        return self.held.untyped_storage()

    def tolist(self):
        return self.detach().cpu().tolist()

    def __reduce_ex__(self, protocol):
        raise TypeError("a tensor on the pretended device is not pickled")


@functools.cache
def indexed(device):
    """The device with its number; without one, the first."""
    device = torch.device(device)
    return torch.device(NAME, device.index or 0) if device.type == NAME else device


def crosses(source, target, tensor):
    if source != target:
        crossed.append((str(source), str(target), tensor.numel() * tensor.element_size()))


def check_one_device(op, tensors, indices=()):
    """The device that an operation runs on; tensors of several raise CUDA's own sentence, but for numbers and indices on the processor."""
    free = [id(index) for index in indices]
    devices = {t.device: None for t in tensors if not (t.device.type == "cpu" and (t.dim() == 0 or id(t) in free))}
    if len(devices) > 1:
        raise RuntimeError(MIXED.format(*list(devices)[:2]) + f" (when checking arguments of {op})")
    return next(iter(devices), tensors[0].device if tensors else None)


def mapped(function, value):
    """Replace the tensors in arguments or results, however they are nested."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)(mapped(function, each) for each in value) if type(value) in (tuple, list) else value


@functools.cache
def made_of_parts(op):
    return op._can_decompose()


def answer(op, *args, **kwargs):
    """Run an operation on what the tensors hold; one that is made of others, as inference mode hands it over whole, by its parts."""
    if torch.is_inference_mode_enabled() and made_of_parts(op):
        return op.decompose(*args, **kwargs)
    wrappers, tensors, asked = {}, [], kwargs.get("device")

    def opened(tensor):
        tensors.append(tensor)
        if type(tensor) is not Pretended:
            return tensor
        wrappers[id(tensor.held)] = tensor
        return tensor.held

    inside = mapped(opened, args), {name: mapped(opened, value) for name, value in kwargs.items()}
    if op in INDEXED and type(args[0]) is not Pretended:
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if op in CROSSING:
        source, target = (args[1], args[0].device) if op is ATEN.copy_.default else (args[0], asked or args[0].device)
        target = indexed(target)
        crosses(source.device, target, source)
    else:
        on = check_one_device(op, tensors, args[1] if op in INDEXED else ())
        target = indexed(asked) if asked is not None else on
        if op is ATEN._local_scalar_dense.default:
            crosses(on, "cpu", tensors[0])
    if asked is not None:
        inside[1]["device"] = "cpu"
        inside[1].pop("pin_memory", None)
    if op is ATEN.histc.default:  # whole numbers are counted on CUDA, and not on the processor
        inside = (inside[0][0].float(), *inside[0][1:]), inside[1]
    out = op(*inside[0], **inside[1])
    if target is None or target.type != NAME:
        return out

    def wrapped(tensor):  # what was changed in place, or given as out=, keeps its outside
        if id(tensor) in wrappers:
            assert wrappers[id(tensor)].shape == tensor.shape, f"{op} changed the size of a tensor on the pretended device"
            return wrappers[id(tensor)]
        with torch.inference_mode(torch.is_inference_mode_enabled() and not (op.is_view and not tensors[0].is_inference())):
            return Pretended(tensor, target)

    return mapped(wrapped, out)


class Module:
    """What stands at `torch.pretend`."""
    there = False  # whether the device is there at the moment: what was registered stays registered, for other tests of the process too
    is_available = staticmethod(lambda: Module.there)
    device_count = staticmethod(lambda: COUNT * Module.there)
    is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    set_device = synchronize = empty_cache = manual_seed_all = reset_peak_memory_stats = staticmethod(lambda *_: None)
    get_device_name = staticmethod(str)
    mem_get_info = staticmethod(lambda *_: (3 << 20, 4 << 20))  # free for three times what every block took: two heads in a pass
    memory_allocated, max_memory_allocated = staticmethod(lambda *_: 1 << 20), staticmethod(lambda *_: 2 << 20)


@functools.cache
def registered():
    """Once in a process: the name, the device guard, and what is answered by dispatch key; or the reason why that cannot be."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup
    except ImportError:
        return None, f"torch {torch.__version__} lets no device be pretended in Python"
    setup(NAME, backend_module=Module())
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(answer, "PrivateUse1")
    for packet in (ATEN.copy_, *RESIZING):
        for op in (getattr(packet, name) for name in packet.overloads() if not name.endswith("out")):
            aten.impl(op, functools.partial(answer, op), "PrivateUse1")
    return (every, aten), ""


@contextmanager
def present():
    """The device is there; where torch cannot pretend one, the reason is given, and it is not."""
    reason = registered()[1]
    Module.there = not reason
    try:
        # accelerate 1.16 asks there, where a device without an allocator is refused
        with patch.object(torch.accelerator, "empty_cache", Module.empty_cache, create=True):
            yield reason
    finally:
        Module.there = False


@contextmanager
def counting():
    """The crossings inside, as a list of (from, to, bytes)."""
    before = len(crossed)
    inside = []
    yield inside
    inside += crossed[before:]
    del crossed[before:]
