"""Raw checkpoint files as dictionaries of memory-mapped tensors: safetensors, torch `.bin` / `.pth`, Meta's shards.

Nothing is read until a tensor is used: a name maps to a view of the file, and the operating system pages it in. So a
model can be built tensor by tensor with no second copy of it in memory. The safetensors layout is eight bytes of header
length, a JSON header {name: {dtype, shape, data_offsets}}, then the raw little-endian bytes.

    tensors = read_folder("checkpoints/opt-125m")      # {name: CPU tensor, a view of the file}
    write_safetensors("out/model.safetensors", tensors)

Left out: pickles that need code to load (weights_only is always on), and the 8-bit and 4-bit types of other libraries.
"""
import json
import os
import struct
from pathlib import Path

import numpy as np
import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_json(path: Path) -> dict:
    """A JSON object from a file, with the file's name in the error."""
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        problem = f"a JSON {type(held).__name__}"
    except ValueError as e:                                     # no JSON, or not even UTF-8
        held, problem = None, e
    if not isinstance(held, dict):
        raise ValueError(f"{path} is not valid JSON with an object in it ({problem}): download it again")
    return held


def write_atomic(path: Path, write) -> None:
    """Call write(file) on a temporary neighbour of path, then rename: readers see the old file or the whole new one."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        write(f)
    os.replace(part, path)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of one .safetensors file; every tensor is a copy-on-write view of the mapped file."""
    path = Path(path)
    size = path.stat().st_size
    data = np.memmap(path, np.uint8, mode="c") if size else np.zeros(0, np.uint8)
    n = struct.unpack("<Q", data[:8].tobytes())[0] if size >= 8 else size
    if 8 + n > size:
        raise ValueError(f"{path} is truncated: {size} bytes, its header alone needs {8 + n}; download it again")
    try:
        header = json.loads(data[8:8 + n].tobytes())
        entries = [(name, *e["data_offsets"], e["dtype"], e["shape"]) for name, e in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a safetensors file: its header is not JSON of names, types and offsets") from None
    body, out = torch.from_numpy(data[8 + n:]), {}
    for name, a, b, kind, shape in entries:
        dtype = DTYPES.get(kind)
        if dtype is None:
            raise ValueError(f"{path}: {name} has type {kind}; known are {', '.join(DTYPES)}")
        if b > len(body):
            raise ValueError(f"{path} is truncated: {name} ends at byte {8 + n + b} of {size}; download it again")
        if b - a != int(np.prod(shape)) * dtype.itemsize:
            raise ValueError(f"{path}: {name} of shape {shape} in {kind} cannot fill {b - a} bytes")
        raw = body[a:b]
        if a % dtype.itemsize or raw.data_ptr() % dtype.itemsize:           # a view needs alignment, so copy
            raw = raw.clone()
        out[name] = raw.view(dtype).view(shape)
    return out


def read_metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says about itself beside its tensors."""
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    return header.get("__metadata__", {})


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write {name: tensor} in the safetensors layout, one tensor at a time, to a temporary name and rename."""
    kinds, header, at = {v: k for k, v in DTYPES.items()}, {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))        # so that all of them are aligned
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)

    def write(f):
        f.write(struct.pack("<Q", len(head)) + head)
        for t in tensors.values():
            if t.numel():
                f.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    write_atomic(path, write)


def read_torch(path: Path):
    """What a torch .bin / .pth / .pt file holds: mapped where its zip layout allows it, weights only."""
    try:
        with open(path, "rb") as f:
            mapped = f.read(4) == b"PK\x03\x04"                 # files from before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:                                      # torch raises a dozen kinds for a damaged file
        why = (str(e) or type(e).__name__).splitlines()[0][:120]
        raise ValueError(f"{path} cannot be read ({why}): download it again") from None


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a torch file."""
    held = read_torch(path)
    if not isinstance(held, dict) or not all(torch.is_tensor(t) for t in held.values()):
        raise ValueError(f"{path} holds something else than a dictionary of tensors")
    return held


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder: one or many .safetensors, else one or many pytorch_model*.bin."""
    folder = Path(folder)
    for single, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_state)):
        index = folder / f"{single}.index.json"
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise ValueError(f"{index} has no weight_map: download it again")
            missing = sorted({f for f in names.values() if not (folder / f).exists()})
            if missing:
                raise FileNotFoundError(f"{folder}: {index.name} lists {missing[0]} ({len(missing)} such), not found")
            out = {}
            for file in sorted(set(names.values())):
                out.update(read(folder / file))
            lost = sorted(set(names) - set(out))
            if lost:
                raise ValueError(f"{folder}: {index.name} lists {lost[0]}, which {names[lost[0]]} does not hold")
            return out
        if (folder / single).exists():
            return read(folder / single)
    raise FileNotFoundError(f"{folder} holds no weights: looked for model.safetensors, pytorch_model.bin, their "
                            f"index files, and consolidated.*.pth")


def read_meta(folder: Path) -> dict[str, torch.Tensor]:
    """Meta's consolidated.NN.pth as whole tensors. With one shard they stay views; more are joined tensor by tensor.

    Model-parallel layers split rows (wq wk wv w1 w3 output) or columns (wo w2); tok_embeddings splits columns in
    LLaMA 1 and 2, rows in 3; norms are replicated.
    """
    files = sorted(Path(folder).glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights: params.json is there, consolidated.*.pth are not")
    shards = [read_state(f) for f in files]
    for f, shard in zip(files, shards):
        if set(shard) != set(shards[0]):
            raise ValueError(f"{f} holds other names than {files[0].name}: the shards are not of one model")
    return LazyJoin(shards)


class LazyJoin(dict):
    """{name: tensor} over model-parallel shards; a tensor is joined when it is asked for."""

    def __init__(self, shards: list[dict]):
        super().__init__(shards[0])
        self.shards = shards

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [s[name] for s in self.shards]
        if len(parts) == 1 or parts[0].dim() == 1:
            return parts[0]
        width = self.shards[0]["norm.weight"].numel()           # d_model, replicated in every shard
        columns = name.endswith(("wo.weight", "w2.weight")) or (
            name.startswith("tok_embeddings") and parts[0].shape[1] < width)
        return torch.cat(parts, dim=1 if columns else 0)
