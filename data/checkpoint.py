"""Raw checkpoint files as dictionaries of memory-mapped tensors: safetensors, torch `.bin` /
`.pth`, Meta's shards.

Nothing is read until a tensor is used: a name maps to a view of the file, and the operating system
pages it in. So a model can be built tensor by tensor with no second copy of it in memory. The
safetensors layout is eight bytes of header length, a JSON header {name: {dtype, shape,
data_offsets}}, then the raw little-endian bytes.

    tensors = read_folder("checkpoints/opt-125m")      # {name: CPU tensor}, see Tensors
    write_safetensors("out/model.safetensors", tensors)
    verify("out/compressed")             # every byte against the checksums written with it

A file comes from anywhere, so everything that it says is checked before it is used: headers as
strictly as the safetensors package does, names of shards, types; and the values of a tensor when it
is asked for. Files that write_safetensors wrote carry a CRC-32 of every tensor (`crc32` in the
header's metadata, which other readers skip). Left out: pickles that need code to load (weights_only
is always on), and the 8-bit and 4-bit types of other libraries.
"""
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

# Types by their names in a safetensors header.
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
         "U8": torch.uint8, "BOOL": torch.bool}
MOST_HEADER = 100_000_000     # bytes; the safetensors package's own limit
MOST_ELEMENTS = 1 << 48       # of a tensor, empty dimensions aside: what torch can index
WEIGHTS = ("weight", "bias", "soft_prompt")    # floating-point tensors by the ends of their names


# --------------------------------------------------------------------------------------------------
# JSON and atomic writes

def parse_json(text: bytes) -> dict:
    """The object in a JSON text. ValueError for what is none, for a name that comes twice and for
    NaN and Infinity."""
    def unique(pairs):
        held = dict(pairs)
        if len(held) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in held if names.count(name) > 1)
            raise ValueError(f"the name {twice!r} comes twice"[:200])
        return held

    def no_number(name):
        raise ValueError(f"{name} is no JSON number")
    try:
        held = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(held, dict):
        raise ValueError(f"a JSON {type(held).__name__}")
    return held


def read_json(path: Path) -> dict:
    """A JSON object from a file, with the file's name in the error."""
    try:
        return parse_json(Path(path).read_bytes())
    except ValueError as e:                                     # no JSON, or not even UTF-8
        raise ValueError(f"{path} is not valid JSON with an object in it ({e}): download it "
                         f"again") from None


def write_json(path: Path, held: dict) -> None:
    """Write a JSON object as read_json reads it; ValueError for NaN and Infinity, which JSON does
    not have."""
    text = json.dumps(held, indent=1, allow_nan=False).encode()
    write_atomic(path, lambda f: f.write(text))


def write_atomic(path: Path, write, check=None) -> None:
    """Call write(file) on a temporary neighbour of path, then check(its path), then rename: readers
    see the old file or the whole new one, and a failure leaves no part behind. OSError, with the
    file's name, if it cannot be written."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            write(f)
        if check:
            check(part)
        os.replace(part, path)
    except BaseException as e:
        try:
            part.unlink(missing_ok=True)
        except OSError:                                   # the folder itself is gone or closed
            pass
        if isinstance(e, OSError):                        # a full disk does not say which file
            raise type(e)(e.errno, f"{path} cannot be written ({e.strerror or e}): free space or "
                                   f"choose another folder") from None
        raise


class Patient:
    """A file for torch's zip writer, which ends the process where a write fails, as on a full disk:
    it hears that all is well, and the error waits here."""

    def __init__(self, file):
        self.file = file
        self.error = None

    def write(self, data) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as e:
            self.error = e
        return len(data)

    def flush(self) -> None:
        pass


def write_torch(path: Path, write) -> None:
    """write_atomic for what torch writes: write(file) may call torch.save(held, file)."""
    def patiently(f):
        file = Patient(f)
        write(file)
        if file.error:
            raise file.error
    write_atomic(path, patiently)


# --------------------------------------------------------------------------------------------------
# Tensors of a file

class Unaligned(NamedTuple):
    """A tensor that a file holds at an odd place: no view, a copy is made whenever it is asked
    for."""
    bytes: torch.Tensor
    dtype: torch.dtype
    shape: torch.Size

    def copy(self) -> torch.Tensor:
        return self.bytes.clone().view(self.dtype).view(self.shape)


class Tensors(dict):
    """{name: CPU tensor, a view of its file}. A tensor that is asked for is looked at once, in one
    pass that copies nothing: ValueError for a weight that is no floating point, for NaN and Inf,
    and for bytes that do not give the checksum they were written with. shape(name) and dtype(name)
    read nothing.

    metadata: what a safetensors header says beside its tensors
    sums: {name: CRC-32 the tensor was written with}, of files that carry them
    files: {name: path of the file that holds it}
    """
    get = Mapping.get                             # these three through __getitem__ as well
    items = Mapping.items
    values = Mapping.values

    def __init__(self, held: dict[str, torch.Tensor], path: Path,
                 metadata: dict[str, str] | None = None, sums: dict[str, int] | None = None):
        super().__init__(held)
        self.metadata = metadata or {}
        self.sums = sums or {}
        self.files = dict.fromkeys(held, Path(path))
        self.seen = set()                         # names of tensors that were looked at

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name)
        if isinstance(tensor, Unaligned):
            tensor = tensor.copy()
        if name not in self.seen:
            check_tensor(tensor, name, self.files[name], self.sums.get(name))
            self.seen.add(name)
        return tensor

    def shape(self, name: str) -> torch.Size:
        return super().__getitem__(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return super().__getitem__(name).dtype

    def join(self, other: "Tensors") -> None:
        """Take in the tensors of another file."""
        twice = next((name for name in other if name in self), None)
        if twice is not None:
            raise ValueError(f"{other.files[twice]} holds {twice}, which {self.files[twice].name} "
                             f"holds too: the shards are not of one model; download them again")
        for name in other:
            super().__setitem__(name, dict.__getitem__(other, name))
        self.files.update(other.files)
        self.sums.update(other.sums)


def check_tensor(tensor: torch.Tensor, name: str, path: Path, checksum: int | None = None) -> None:
    """ValueError, which names tensor and file, for a weight of another type than floating point,
    for NaN or Inf in it, and for bytes whose CRC-32 is not `checksum`. One pass; 2 to 8 GB/s on one
    core."""
    if not tensor.is_floating_point() and name.rpartition(".")[2] in WEIGHTS:
        raise ValueError(f"{path}: {name} is of type {tensor.dtype}, and weights are floating "
                         f"point: save them as such")
    if tensor.is_floating_point() and tensor.dtype not in TYPES.values():
        raise ValueError(f"{path}: {name} is of type {tensor.dtype}, which is not read; known are "
                         f"{', '.join(TYPES)}")
    if checksum is not None and checksum != crc32(tensor):
        raise damaged(path, name)
    if tensor.is_floating_point() and tensor.numel():
        ends = torch.stack(torch.aminmax(tensor.detach()))         # NaN is the minimum of anything
        if not ends.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or Inf: it was damaged, or saved in a type "
                             f"it does not fit")


def damaged(path: Path, name: str) -> ValueError:
    """What to raise for a tensor that has another checksum than the file says."""
    return ValueError(f"{path} is damaged: {name} does not have the checksum it was written with; "
                      f"copy or make it again")


def crc32(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes in memory order, the file's."""
    return zlib.crc32(raw(tensor)) if tensor.numel() else 0


def raw(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes; no copy if it lies in one piece on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


# --------------------------------------------------------------------------------------------------
# safetensors

class Entry(NamedTuple):
    """A tensor as a safetensors header describes it; first and end are bytes, from where the
    tensors begin."""
    name: str
    first: int
    end: int
    dtype: torch.dtype
    shape: list[int]


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, mapped copy-on-write."""
    try:
        if os.path.getsize(path) == 0:                  # nothing cannot be mapped
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, mode="c")
    except OSError as e:
        raise unreadable(path, e) from None


def unreadable(path: Path, e: OSError) -> OSError:
    """The same error with the file's name in it."""
    return type(e)(e.errno, f"{path} cannot be read ({e.strerror or e})")


def read_header(path: Path, data: np.ndarray) -> tuple[list[Entry], dict[str, str], int]:
    """(entries in the order of their bytes, metadata, where the tensors begin) of a mapped
    safetensors file. Tensors fill the file: none overlaps another, and nothing lies before, between
    or after them."""
    size = len(data)
    length = struct.unpack("<Q", data[:8].tobytes())[0] if size >= 8 else size
    begin = 8 + length
    if begin > size:
        raise ValueError(f"{path} is truncated: {size} bytes, its header alone needs {begin}; "
                         f"download it again")
    if length > MOST_HEADER:
        raise ValueError(f"{path} is not a safetensors file: a header of {length} bytes, at most "
                         f"{MOST_HEADER} are allowed")
    try:
        entries, metadata = parse_header(data[8:begin].tobytes())
    except UnknownType as e:
        raise ValueError(f"{path}: {e}: convert it to one of these") from None
    except ValueError as e:
        raise ValueError(f"{path} is not a safetensors file: its header is damaged ({e}); download "
                         f"it again") from None
    at = 0
    for entry in entries:
        if entry.first != at:
            raise ValueError(f"{path} is damaged: {entry.name} begins at byte {entry.first} of the "
                             f"tensors, and {at} is where the one before it ends; download it "
                             f"again")
        if begin + entry.end > size:
            raise ValueError(f"{path} is truncated: {entry.name} ends at byte {begin + entry.end} "
                             f"of {size}; download it again")
        at = entry.end
    if begin + at != size:
        raise ValueError(f"{path} is damaged: {size - begin - at} bytes follow the last tensor; "
                         f"download it again")
    return entries, metadata, begin


class UnknownType(ValueError):
    """A tensor is of a type that is not read, such as FP8; the file may be whole."""


def parse_header(text: bytes) -> tuple[list[Entry], dict[str, str]]:
    """(entries in the order of their bytes, metadata) of a header's JSON; ValueError if it is no
    header."""
    if text[:1] != b"{":
        raise ValueError("it does not begin with {")
    header = parse_json(text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not a dictionary of strings")
    entries = [entry_of(name, said) for name, said in header.items()]
    return sorted(entries, key=lambda entry: (entry.first, entry.end)), metadata


def entry_of(name: str, said) -> Entry:
    """What a safetensors header says of a tensor, {"dtype", "shape", "data_offsets"}; ValueError
    where that is no tensor's."""
    if not isinstance(said, dict):
        raise ValueError(f"{name[:200]} is no object")
    kind, shape, offsets = (said.get(key) for key in ("dtype", "shape", "data_offsets"))
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(map(is_size, numbers)):
            raise ValueError(f"{key} of {name[:200]} is no list of whole numbers from 0 on")
    if kind not in list(TYPES):                     # it may be no text, nor hashable
        is_name = isinstance(kind, str) and re.fullmatch(r"[A-Z0-9_]{1,16}", kind)
        raise (UnknownType if is_name else ValueError)(
            f"{name[:200]} has type {str(kind)[:50]}; known are {', '.join(TYPES)}")
    size = math.prod(shape) * TYPES[kind].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ValueError(f"{name[:200]} of shape {str(shape)[:80]} in {kind} cannot fill bytes "
                         f"{str(offsets)[:80]}")
    if len(shape) > 8 or math.prod(max(i, 1) for i in shape) > MOST_ELEMENTS:
        raise ValueError(f"{name[:200]} has a shape that no model has: {str(shape)[:80]}")
    return Entry(name, *offsets, TYPES[kind], shape)


def is_size(number) -> bool:
    """A whole number that an int64 holds, from 0 on; True and False are none."""
    return type(number) is int and 0 <= number < 1 << 63


def read_safetensors(path: Path) -> Tensors:
    """The tensors of one .safetensors file, copy-on-write views of the mapped file (or Unaligned),
    and its metadata."""
    data = map_file(path)
    entries, metadata, begin = read_header(path, data)
    body = torch.from_numpy(data[begin:])
    held = {}
    for name, first, end, dtype, shape in entries:
        part = body[first:end]
        if first % dtype.itemsize or part.data_ptr() % dtype.itemsize:
            held[name] = Unaligned(part, dtype, torch.Size(shape))
        else:
            held[name] = part.view(dtype).view(shape)
    return Tensors(held, path, metadata, checksums(path, metadata, held))


def checksums(path: Path, metadata: dict[str, str], names) -> dict[str, int]:
    """{name: CRC-32} of a file that carries them, {} of one that does not. names: the tensors that
    the file holds now; ValueError if they are others than those it was written with."""
    if "crc32" not in metadata:
        return {}
    try:
        said = parse_json(metadata["crc32"].encode())
        sums = {name: int(value, 16) for name, value in said.items()}
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: its checksums are not numbers; copy or make it "
                         f"again") from None
    odd = sorted(set(sums) ^ set(names))
    if odd:
        what = "removed" if odd[0] in sums else "added"
        raise ValueError(f"{path} is damaged: {odd[0]} was {what} after it was written "
                         f"({len(odd)} such); copy or make it again")
    return sums


def read_metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says about itself beside its tensors."""
    _, metadata, _ = read_header(path, map_file(path))
    return metadata


def header_sum(path: Path) -> str:
    """CRC-32 of a safetensors header, eight hexadecimal digits. It covers the tensors too where the
    header holds their checksums: so a few bytes elsewhere can say which file is meant."""
    data = map_file(path)
    _, _, begin = read_header(path, data)
    return f"{zlib.crc32(data[:begin]):08x}"


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor],
                      metadata: dict[str, str] | None = None) -> None:
    """Write {name: tensor} and their checksums in the safetensors layout, one tensor at a time, to
    a temporary name; read that back and compare; rename."""
    wide_first = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    tensors = dict(wide_first)                           # so that all of them are aligned
    names_of_types = {dtype: name for name, dtype in TYPES.items()}
    entries = {}
    at = 0
    for name, t in tensors.items():
        end = at + t.numel() * t.element_size()
        entries[name] = {"dtype": names_of_types[t.dtype], "shape": list(t.shape),
                         "data_offsets": [at, end]}
        at = end
    sums = dict.fromkeys(tensors, "0" * 8)               # as wide as the real ones, which come last

    def header() -> bytes:
        about = {"format": "pt", **(metadata or {}), "crc32": json.dumps(sums)}
        text = json.dumps({"__metadata__": about, **entries}).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def write(f):
        f.write(header())
        for name, t in tensors.items():
            if t.numel():
                data = raw(t)
                f.write(data)
                sums[name] = f"{zlib.crc32(data):08x}"
        f.seek(0)
        f.write(header())
    write_atomic(path, write, check=verify_file)


# --------------------------------------------------------------------------------------------------
# Checksums

def verify_file(path: Path) -> int | None:
    """Compare every tensor of a .safetensors file with its checksum: how many there are, None if
    the file has none. ValueError names the first that differs."""
    data = map_file(path)
    entries, metadata, begin = read_header(path, data)
    sums = checksums(path, metadata, [entry.name for entry in entries])
    if "crc32" not in metadata:
        return None
    for name, first, end, *_ in entries:
        if zlib.crc32(data[begin + first:begin + end]) != sums[name]:
            raise damaged(path, name)
    return len(entries)


def verify(folder: Path) -> dict[str, int | None]:
    """{file: tensors compared with their checksums, None for a file without} of all .safetensors
    files in a folder. ValueError names the first file and tensor that is damaged."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors files: nothing else carries "
                                f"checksums")
    return {file.name: verify_file(file) for file in files}


# --------------------------------------------------------------------------------------------------
# torch files

def read_torch(path: Path):
    """What a torch .bin / .pth / .pt file holds: mapped where its zip layout allows it, weights
    only."""
    try:
        with open(path, "rb") as f:
            mapped = f.read(4) == b"PK\x03\x04"       # files from before torch 1.6 cannot be mapped
    except OSError as e:
        raise unreadable(path, e) from None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        check_held(held)
    except Exception as e:                     # torch raises a dozen kinds for a damaged file
        why = (str(e) or type(e).__name__).splitlines()[0][:120]
        if why.startswith("Weights only load failed"):
            why = "it is cut short, damaged, or holds more than tensors"
        raise ValueError(f"{path} cannot be read ({why}): download it again") from None
    return held


def check_held(held, name: str = "") -> None:
    """ValueError for anything but plain CPU tensors, numbers, strings and None, in lists and
    dictionaries with strings as keys."""
    if torch.is_tensor(held):
        if not is_plain(held):
            raise ValueError(f"{name or 'it'} is not an ordinary tensor")
    elif isinstance(held, dict):
        for key, value in held.items():
            if not isinstance(key, str):
                raise ValueError(f"a name is no string but {str(key)[:40]!r}")
            check_held(value, key)
    elif isinstance(held, (list, tuple)):
        for value in held:
            check_held(value, name)
    elif not isinstance(held, (str, int, float, type(None))):
        raise ValueError(f"{name or 'it'} is a {type(held).__name__}")


def is_plain(tensor: torch.Tensor) -> bool:
    """Has it its own bytes on the CPU for every element? Meta, sparse, quantized, nested, complex
    and repeated ones have not."""
    return (type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.device.type == "cpu"
            and tensor.layout == torch.strided
            and not tensor.is_quantized
            and not tensor.is_nested
            and not tensor.is_complex()
            and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())


def read_state(path: Path) -> Tensors:
    """{name: tensor} of a torch file."""
    held = read_torch(path)
    if not isinstance(held, dict) or not all(torch.is_tensor(t) for t in held.values()):
        raise ValueError(f"{path} holds something else than a dictionary of tensors: it is no "
                         f"checkpoint of weights")
    return Tensors({name: t.detach() for name, t in held.items()}, path)


# --------------------------------------------------------------------------------------------------
# Folders

def read_folder(folder: Path) -> Tensors:
    """All tensors of a Hugging Face folder: one or many .safetensors, else one or many
    pytorch_model*.bin. A single file goes before an index, which an older save may have left."""
    folder = Path(folder)
    kinds = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_state}
    for single, read in kinds.items():
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return read(folder / single)
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise ValueError(f"{index} has no weight_map: download it again")
            return read_shards(folder, index, names, read)
    raise FileNotFoundError(f"{folder} holds no weights: looked for model.safetensors, "
                            f"pytorch_model.bin, their index files, and consolidated.*.pth")


def read_shards(folder: Path, index: Path, names: dict[str, str], read) -> Tensors:
    """The tensors of the files that an index {name of a tensor: name of a file} lists, each in the
    file it says."""
    for name, file in names.items():
        if not isinstance(file, str) or not is_inside(file):
            raise ValueError(f"{index} places {name[:200]} in {str(file)[:100]!r}, and only files "
                             f"inside its folder are read: download it again")
    files = sorted(set(names.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {index.name} lists {missing[0]} ({len(missing)} such), "
                                f"not found")
    held = read(folder / files[0])
    for file in files[1:]:
        held.join(read(folder / file))
    for name, file in names.items():
        if name not in held or held.files[name] != folder / file:
            raise ValueError(f"{folder}: {index.name} lists {name[:200]}, which {file} does not "
                             f"hold: download both again")
    return held


def is_inside(file: str) -> bool:
    """Is it a path that stays in the folder it is taken from?"""
    path = PurePosixPath(file)
    return (0 < len(file) < 200 and file.isprintable()
            and path.name != "" and ".." not in path.parts and not path.is_absolute()
            and "\\" not in file and ":" not in file)             # what Windows takes for a path


def read_meta(folder: Path) -> Tensors:
    """Meta's consolidated.NN.pth as whole tensors. With one shard they stay views; more are joined
    tensor by tensor.

    Model-parallel layers split rows (wq wk wv w1 w3 output) or columns (wo w2); tok_embeddings
    splits columns in LLaMA 1 and 2, rows in 3; norms are replicated.
    """
    files = sorted(Path(folder).glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights: params.json is there, "
                                f"consolidated.*.pth are not")
    for i, file in enumerate(files):
        wanted = f"consolidated.{i:02d}.pth"
        if file.name != wanted:
            raise FileNotFoundError(f"{folder} holds {file.name}, but no {wanted}: a shard is "
                                    f"missing")
    shards = [read_state(file) for file in files]
    first = shards[0]
    for file, shard in zip(files, shards):
        if set(shard) != set(first) or any(shard.shape(n) != first.shape(n) for n in first):
            raise ValueError(f"{file} holds other names or shapes than {files[0].name}: the shards "
                             f"are not of one model")
    weights = [name for name in first if name.endswith("weight")]
    if "norm.weight" not in first or any(len(first.shape(n)) not in (1, 2) for n in weights):
        raise ValueError(f"{files[0]} does not hold LLaMA's weights: no norm.weight, or weights "
                         f"that are no matrices")
    return first if len(shards) == 1 else LazyJoin(shards)


class LazyJoin(Tensors):
    """{name: tensor} over model-parallel shards; a tensor is joined when it is asked for."""

    def __init__(self, shards: list[Tensors]):
        super().__init__(shards[0], "")
        self.shards = shards
        self.files = shards[0].files

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [shard[name] for shard in self.shards]
        dim = self.split(name)
        return parts[0] if dim is None else torch.cat(parts, dim)

    def shape(self, name: str) -> torch.Size:
        shape = list(self.shards[0].shape(name))
        dim = self.split(name)
        if dim is not None:
            shape[dim] *= len(self.shards)
        return torch.Size(shape)

    def split(self, name: str) -> int | None:
        """The dimension along which a tensor is split; None: every shard holds all of it."""
        shape = self.shards[0].shape(name)
        if len(shape) < 2:
            return None
        if name.endswith(("wo.weight", "w2.weight")):
            return 1
        width = self.shards[0].shape("norm.weight")[0]          # d_model, replicated in every shard
        if name.startswith("tok_embeddings") and shape[1] < width:
            return 1
        return 0
