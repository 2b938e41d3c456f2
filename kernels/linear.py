"""A Linear whose weight stays packed: Triton on a GPU; on a CPU torch's int4 product to decode,
unpacking for the rest.

    layer = PackedLinear(pack(codes, mask, scale, zero, bits=4), bias)  # called like nn.Linear
    layer.fused = False                         # compare: unpack, then F.linear, always

No weight gets a gradient and nothing dense is kept for the backward pass: dx = dy W unpacks (or
decodes) once more, which is what lets a prompt be trained through a compressed model. For few
tokens, as while generating, a CPU makes a second form of the weight that is quick to multiply: in
bf16 int4 (cpu_int4.py), else bags (cpu_bags.py). `decode_bytes()` tells its size and
`decode_cache = False` forbids it. The packed tensors are not read then: where a file is mapped they
need no memory. On a CPU fp16 is computed in fp32, because fp16 products are some sixty times slower
there.

On a GPU the first product reorders the weight for it (fragments.py), in place of the packed
tensors; who asks for `packed` gets these back. So a CUDA graph wants one call with as many tokens
before it is recorded. What `triton_reads` refuses, float64, and GPUs before Ampere unpack the whole
weight for every product by torch operations. torch.compile goes around these layers.
"""
import warnings
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import cpu_bags, cpu_int4
from kernels.packing import Packed
from kernels.reference import dequantize
from kernels.unpacking import unpack


class PackedMatmul(torch.autograd.Function):
    """y = x W^T, dx = dy W. Saves nothing but the layer, that is, the packed tensors. Each is the
    other's gradient, so that gradients of any order are right."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: "PackedLinear",
                transposed: bool = False) -> torch.Tensor:
        ctx.layer = layer
        ctx.transposed = transposed
        return layer.product(x, transposed)

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        return PackedMatmul.apply(dy, ctx.layer, not ctx.transposed), None, None


def triton_reads(packed: Packed) -> bool:
    """Can the kernels multiply this? 4-bit codes, groups of neighbours."""
    return packed.meta["bits"] == 4 and "g_idx" not in packed.tensors


@cache
def runs_triton(device: torch.device) -> bool:
    """Do the kernels run on this GPU? Their instructions came with compute capability 8.0, and
    Triton compiles a little C at its first use."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if not is_nvidia or find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from triton.runtime import driver
        driver.active.get_current_target()
    except Exception as problem:
        said = (str(problem).splitlines() or [""])[0]
        warnings.warn(f"Triton cannot start ({said}): packed weights are unpacked for every "
                      f"product, which is slow. It needs a C compiler and Python.h (gcc, "
                      f"python3-dev)")
        return False
    return True


class Unpacked:
    """The decode cache of 8-bit codes: the whole weight."""
    most_tokens = cpu_int4.MOST_TOKENS

    def __init__(self, packed: Packed):
        self.weight = unpack(packed, torch.float32)

    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight).to(x.dtype)


def decode_form(packed: Packed, dtype: torch.dtype) -> type:
    """What decodes x of this dtype fastest without the whole weight in memory, where there is such
    a thing."""
    if dtype == torch.bfloat16 and cpu_int4.fits(packed.meta) and "g_idx" not in packed.tensors:
        return cpu_int4.Int4
    return cpu_bags.Bags if cpu_bags.fits(packed.meta) else Unpacked


def computed_in(x: torch.Tensor) -> torch.dtype:
    """The dtype of a product with x: fp16 is slow on a CPU."""
    return torch.float32 if x.dtype == torch.float16 and not x.is_cuda else x.dtype


class PackedLinear(nn.Module):
    """x (..., in_features) in fp32, bf16 or fp16 -> (..., out_features). Buffers carry the names of
    packed.tensors."""

    def __init__(self, packed: Packed, bias: torch.Tensor | None = None, fused: bool = True):
        super().__init__()
        self.meta = packed.meta
        self.fused = fused
        self.decode_cache = True
        self.out_features, self.in_features = packed.meta["shape"]
        self.names = list(packed.tensors)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.decoder = None, None  # (what it was made of, what decodes), made at the first use
        self.reordered = False     # on a GPU: are the buffers fragments?
        self.plan = None           # on a GPU: what is launched
        self.in_triton = triton_reads(packed)

    def held(self) -> dict[str, torch.Tensor]:
        """The buffers that the weight lies in."""
        return {name: getattr(self, name) for name in self.names}

    def hold(self, tensors: dict[str, torch.Tensor], reordered: bool) -> None:
        """Let the weight lie in other buffers; reordered: they are fragments."""
        for name in self.names:
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.names = list(tensors)
        self.reordered = reordered
        self.plan = None

    def in_file_order(self) -> dict[str, torch.Tensor]:
        """The tensors of a file, on the layer's device."""
        if not self.reordered:
            return self.held()
        from kernels.fragments import Fragments, from_fragments
        tensors = from_fragments(Fragments(self.held(), self.meta)).tensors
        return {name: t.to(self.codes.device) for name, t in tensors.items()}

    def restore(self) -> None:
        """The buffers are the tensors of a file again, until the next product on a GPU."""
        if self.reordered:
            self.hold(self.in_file_order(), False)

    @property
    def packed(self) -> Packed:
        """The tensors of a file, which a layer that a GPU has used goes back to."""
        self.restore()
        return Packed(self.held(), self.meta)

    def launches(self):
        """The matmul.Plan of this layer on its GPU, the weight reordered for it."""
        if self.plan is None:
            # here, because triton exists on few machines
            from kernels.fragments import Fragments, to_fragments
            from kernels.matmul import Plan
            if not self.reordered:
                self.hold(to_fragments(self.packed).tensors, True)
            self.plan = Plan(Fragments(self.held(), self.meta))
        return self.plan

    def weight_dequantized(self, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        """(out, in) on the layer's device."""
        if self.reordered and self.codes.is_cuda:
            with torch.cuda.device_of(self.codes):
                return self.launches().unpack(dtype, (0, self.out_features), (0, self.in_features))
        made_by = unpack if self.codes.device.type == "cpu" else dequantize
        return made_by(self.packed, dtype)

    def decode_bytes(self) -> int:
        """Memory of the CPU's decode cache, on top of the packed tensors; 0 before the first
        decoding step."""
        return 0 if self.decoder[1] is None else self.decoder[1].nbytes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():       # disable() loads the compiler, so only then
            return torch.compiler.disable(self.multiply)(x)
        return self.multiply(x)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            raise TypeError(f"x is of type {x.dtype}: a PackedLinear multiplies floating point")
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        if kind == "cpu" and self.fused and self.decodes(x):
            y = self.decoder[1](x)
        elif x.requires_grad and torch.is_grad_enabled():
            y = PackedMatmul.apply(x, self)
        else:
            y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """x W^T, or x W: by Triton on a GPU, or by unpacking W for this one product."""
        in_triton = self.fused and self.in_triton and x.dtype != torch.float64
        if in_triton and runs_triton(x.device):
            from kernels.matmul import matmul, matmul_transposed
            multiply = matmul_transposed if transposed else matmul
            if x.device.index == torch.cuda.current_device():
                return multiply(x, self.launches())
            with torch.cuda.device_of(x):
                return multiply(x, self.launches())
        weight = self.weight_dequantized(computed_in(x))
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(weight.dtype), weight.T if transposed else weight).to(x.dtype)

    def decodes(self, x: torch.Tensor) -> bool:
        """Is this a decoding step, on a CPU? Makes the cache if so."""
        tokens = x.numel() // self.in_features
        if not self.decode_cache:
            return False
        if x.requires_grad and torch.is_grad_enabled():
            return False
        if not tokens or x.dtype == torch.float64:
            return False
        # made anew where a buffer was replaced, or written to, which tensors that were made in
        # inference mode do not tell
        held = [(t.data_ptr(), 0 if t.is_inference() else t._version)
                for t in self._buffers.values() if t is not None]
        if self.decoder[0] != (x.dtype, held):
            form = decode_form(self.packed, x.dtype)
            if tokens > form.most_tokens:
                return False
            self.decoder = (x.dtype, held), form(self.packed)
        return tokens <= self.decoder[1].most_tokens

    def _apply(self, fn, recurse=True):
        """Moves between devices and dtypes, except that the grid stays the fp16 that the codes were
        rounded with."""
        grid = {name: getattr(self, name) for name in ("scale", "zero")}
        super()._apply(fn, recurse)
        for name, exact in grid.items():
            if not exact.is_meta:                   # there to_empty leaves nothing to keep
                setattr(self, name, exact.to(getattr(self, name).device))
        self.decoder = None, None
        self.plan = None
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.names:
            del destination[prefix + name]
        for name, tensor in self.in_file_order().items():   # files know no other order
            destination[prefix + name] = tensor

    def __getstate__(self):
        # what is launched cannot be copied, and the decoder's layout is this processor's own
        return {**self.__dict__, "plan": None, "decoder": (None, None)}

    def _load_from_state_dict(self, *args, **kwargs):
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        self.decoder = None, None
        self.in_triton = triton_reads(self.packed)

    def extra_repr(self) -> str:
        m = self.meta
        return (f"{self.in_features}, {self.out_features}, {m['format']}, {m['bits']} bits, "
                f"{m['grid']}")
