"""Packed weights and the matrix products that read them. It knows tensors, not models: copy the
folder as it is."""
from kernels.linear import PackedLinear
from kernels.packing import Packed, bits_per_weight, nbytes, pack
from kernels.unpacking import unpack, unpack_codes
