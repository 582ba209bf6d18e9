"""GGUF files, as llama.cpp writes them: looked at before a library reads them, converted once into safetensors."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from llvlit.checks import shown
from llvlit.engine.folder import Shapes, check_numbers, check_size, misfit, refuse_encoder
from llvlit.engine.precision import free_memory
from llvlit.errors import FileError, ModelError
from llvlit.files import finish, finished, replaced
from llvlit.progress import progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CONVERSION = 1
"""Version of what :func:`converted` writes; another one makes another folder."""

KIND = "converted model"
"""What the mark of a folder in the cache says."""

NUMBERS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}
STRING, LIST = 8, 9
"""Kinds of a value in a header, by number."""

MOST_ENTRIES = 2**21
"""Longest list in a header that is read: the largest vocabularies have an eighth of it."""


TABLE = "rope_freqs.weight"
"""The tensor that scales the frequencies of rotary positions."""

AS_READ = {
    "rope.freq_base": ("rope_theta",),
    "rope.scaling.factor": ("factor",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
"""Values that decide a model's numbers, and how configurations name them: transformers leaves out some, silently."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes
    ----------
    values : dict
        Numbers and strings by key; of a list, its length.
    shapes : dict
        Shape of each tensor, rows first.
    types : dict
        Type of each tensor, such as ``Q4_1``.
    """

    values: dict[str, Any]
    shapes: Shapes
    types: dict[str, str]


class _Cursor:
    """A place in a file, which moves on with what is read; where that is more than the file has, it is cut short."""

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self.content, self.path, self.at = content, path, 0

    def number(self, form: str) -> Any:
        """The number here, of a form as :mod:`struct` names them."""
        (value,) = struct.unpack_from(form, self.content, self.skip(struct.calcsize(form)))
        return value

    def text(self) -> str:
        """The string here, behind its length."""
        size = self.number("<Q")
        start = self.skip(size)
        return self.content[start : start + size].decode("utf-8", "replace")

    def value(self) -> Any:
        """The value here, behind its kind; of a list, its length."""
        kind = self.number("<I")
        if kind == LIST:
            entries, count = self.number("<I"), self.bounded(self.number("<Q"))
            for _ in range(count if entries == STRING else 0):
                self.skip(self.number("<Q"))
            self.skip(0 if entries == STRING else count * struct.calcsize(self._form(entries)))
            return count
        return self.text() if kind == STRING else self.number(self._form(kind))

    def bounded(self, count: int) -> int:
        """A count of what follows, each of which takes a byte at least."""
        if count > MOST_ENTRIES:
            raise ModelError(f"{self.path} tells of a list of {count:,}; at most {MOST_ENTRIES:,} entries are read.")
        return count

    def skip(self, size: int) -> int:
        """Where what is skipped begins."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.content):
            raise ModelError(f"{self.path} is cut short, or damaged: its header goes on beyond its end.")
        return start

    def _form(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise ModelError(f"{self.path} is damaged: its header holds a value of the unknown kind {kind}.")
        return NUMBERS[kind]


def read_header(path: Path) -> Header:
    """What a GGUF file says of itself, no more of it believed than its size allows.

    Raises
    ------
    ModelError
        If it is no GGUF file, of another version, cut short, or its parts do not fit together.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    with path.open("rb") as file:
        start = file.read(24)
        if start[:4] != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it begins with {shown(start[:4])}.")
        if len(start) < 24:
            raise ModelError(f"{path} is cut short: it has {len(start)} bytes.")
        version, n_tensors, n_values = struct.unpack("<IQQ", start[4:])
        if version not in (2, 3):
            raise ModelError(f"{path} is of GGUF version {version}; 2 and 3 can be read, in little-endian order.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            cursor = _Cursor(content, path)
            cursor.skip(24)
            values: dict[str, Any] = {}
            for _ in range(cursor.bounded(n_values)):
                key = cursor.text()
                values[key] = cursor.value()
            shapes: Shapes = {}
            places: dict[str, tuple[int, int]] = {}
            for _ in range(cursor.bounded(n_tensors)):
                name, n_sizes = cursor.text(), cursor.number("<I")
                if name in shapes or n_sizes > 4:
                    raise ModelError(f"{path} is damaged: it gives {shown(name)} twice, or {n_sizes} sizes for it.")
                shapes[name] = tuple(reversed([cursor.number("<Q") for _ in range(n_sizes)]))
                places[name] = cursor.number("<I"), cursor.number("<Q")
            size, at = len(content), cursor.at
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise ModelError(f"{path} is damaged: general.alignment={shown(alignment)}.")
    behind, total, types = size - math.ceil(at / alignment) * alignment, 0, {}
    known = {kind.value: kind for kind in GGMLQuantizationType}
    for name, (number, offset) in places.items():
        if number not in known:
            raise ModelError(f"{path}: {shown(name)} is of type {number}, which the package gguf does not know.")
        types[name] = known[number].name
        block, block_bytes = GGML_QUANT_SIZES[known[number]]
        n_bytes = math.ceil(math.prod(shapes[name]) / block) * block_bytes
        total += n_bytes
        if max(offset + n_bytes, total) > behind:
            raise ModelError(f"{path} is cut short: {shown(name)} lies beyond its {size:,} bytes. Fetch it again.")
    return Header(values, shapes, types)


def packaged_file(package: str) -> Path | None:
    """The GGUF file that an installed package brings, which is not imported; None if there is none."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return None
    places = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return next((place for place in places if place.is_file()), None)


def cache_folder() -> Path:
    """Where converted models are kept: ``LLVLIT_CACHE``, else the platform's own place."""
    return Path(os.environ.get("LLVLIT_CACHE") or user_cache_path("llvlit")).expanduser() / "gguf"


def converted(path: Path, name: str) -> Path:
    """Folder with a GGUF file's model as safetensors, in :func:`cache_folder`; made if it is not there.

    Its name is the SHA-256 of the file and the version of the conversion.  It is renamed into place when it is whole,
    and one process at a time writes it: the others wait.

    Raises
    ------
    ModelError
        If the file is not what it should be (:func:`read_header`), is of an architecture that transformers does not
        read, or has no tokenizer.
    FileError
        If the cache cannot be written.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / f"{digest}-{CONVERSION}"
    if finished(folder, KIND) is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if finished(folder, KIND) is None:
                    with replaced(folder, KIND) as fresh:
                        finish(fresh, KIND, source=path.name, **_convert(path, fresh, name))
        except OSError as error:
            raise FileError(f"{folder} cannot be written ({error}). Name another folder in LLVLIT_CACHE.") from error
    return folder


def source_types(folder: Path) -> list[str]:
    """Types of the matrices in the file that a folder was converted from."""
    return [str(each) for each in (finished(folder, KIND) or {}).get("types", [])]


def _convert(path: Path, folder: Path, name: str) -> dict[str, Any]:
    """Write the model and the tokenizer of a file; facts about them."""
    try:
        import accelerate  # noqa: F401  (which transformers asks for)
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(f'{name} is a GGUF file; to read it: pip install "llvlit[gguf]" ({error}).') from error
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    header = read_header(path)
    _check_header(path, header)
    options = {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
    with _alone(path) as place, _bar_of_weights(path.name):
        config = AutoConfig.from_pretrained(place, **options)
        refuse_encoder(config.to_dict(), name)
        check_numbers(config.to_dict(), header.shapes, str(path))
        if TABLE in header.shapes:
            _read_table(config, path)
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
        check_size(shell, header.shapes, name)
        _check_all_is_used(shell, header, name)
        _check_values(config.to_dict(), header, path)
        needed, free = 8 * sum(math.prod(shape) for shape in header.shapes.values()), free_memory(torch.device("cpu"))
        if needed > free:
            raise ModelError(
                f"To convert {path} takes {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free. Load the "
                "model's safetensors with stream=True, one layer at a time."
            )
        tokenizer = AutoTokenizer.from_pretrained(place, config=config, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,  # said below, in our words
            output_loading_info=True,
            **options,
        )
    module, loading = loaded
    if wrong := sorted([*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]):
        raise misfit(name, f": {len(wrong)} tensors are missing or of another shape, such as {wrong[0]}")
    shell.load_state_dict({key: _shortest(value) for key, value in module.state_dict().items()}, assign=True)
    shell.tie_weights()
    shell.config.dtype = None
    shell.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"types": sorted({header.types[key] for key, shape in header.shapes.items() if len(shape) > 1})}


def _check_header(path: Path, header: Header) -> None:
    """ModelError unless transformers reads the architecture, and there are a tokenizer and as many layers as said."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    architecture = str(header.values.get("general.architecture"))
    plain = {known.replace("_", "").replace("-", "") for known in GGUF_SUPPORTED_ARCHITECTURES}
    if architecture.replace("_", "").replace("-", "") not in plain:
        raise ModelError(
            f"{path} holds a model of the architecture {shown(architecture)}, which transformers cannot read."
        )
    if not header.values.get("tokenizer.ggml.tokens") or "tokenizer.ggml.model" not in header.values:
        raise ModelError(f"{path} holds no tokenizer. Convert the model again, with its vocabulary.")
    layers = header.values.get(f"{architecture}.block_count")
    if not isinstance(layers, int) or not 0 < layers <= len(header.shapes):
        raise ModelError(f"{path} tells of {shown(layers)} layers, and holds {len(header.shapes)} tensors.")


def _read_table(config: PretrainedConfig, path: Path) -> None:
    """Set the scaled rotary positions of Llama 3, which a file holds as a table of what each frequency is divided by.

    A table of another kind is left to :func:`_check_all_is_used`.
    """
    from gguf import GGUFReader
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    (table,) = (torch.tensor(tensor.data.copy()) for tensor in GGUFReader(path).tensors if tensor.name == TABLE)
    before = dict(config.rope_parameters)
    made_of = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config.rope_parameters = {**before, "rope_type": "llama3", "factor": float(table.max()), **made_of}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = before["rope_theta"] ** (-torch.arange(len(frequencies)) / len(frequencies))
    if table.shape != frequencies.shape or not torch.allclose(plain / frequencies, table, rtol=1e-4):
        config.rope_parameters = before


def _check_all_is_used(shell: PreTrainedModel, header: Header, name: str) -> None:
    """ModelError if a file holds more than its model takes: layers too many, or tables that move its positions."""
    takes = sum({id(value): value.numel() for value in shell.state_dict(keep_vars=True).values()}.values())
    tied = shell.get_output_embeddings().weight is shell.get_input_embeddings().weight
    known = {"output.weight"} if tied else set()
    if (getattr(shell.config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        known.add(TABLE)
    shapes = {key: shape for key, shape in header.shapes.items() if key not in known}
    if (stored := sum(math.prod(shape) for shape in shapes.values())) > takes:
        tables = [key for key in shapes if not key.startswith(("blk.", "token", "output", "position"))]
        such = f", such as {shown(tables[0])}" if tables else ""
        raise misfit(name, f": it takes {takes:,} numbers, and {stored:,} are stored{such}")


def _check_values(config: dict[str, Any], header: Header, path: Path) -> None:
    """ModelError if a value that decides the model's numbers is another one in the configuration made of the file."""
    read: dict[str, list[float]] = {}
    parts = [config]
    for part in parts:  # which grows
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            if isinstance(value, int | float):
                read.setdefault(key, []).append(value)
    architecture = header.values["general.architecture"]
    for key, names in AS_READ.items():
        value = header.values.get(f"{architecture}.{key}")
        found = [number for name in names for number in read.get(name, [])]
        if not isinstance(value, int | float) or (key == "rope.scaling.factor" and value in (0, 1)):
            continue
        if not any(math.isclose(value, number, rel_tol=1e-5) for number in found):
            raise ModelError(
                f"{path} has {architecture}.{key}={value:g}, which transformers reads as {found or 'nothing'}: it "
                "would be another model. Load its safetensors instead."
            )


def _shortest(value: torch.Tensor) -> torch.Tensor:
    """The same numbers in 16 bits, if these hold all of them."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(value.to(dtype).to(value.dtype), value):
            return value.to(dtype)
    return value


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A folder with nothing but the file in it, as ``model.gguf``: files beside it say nothing about it."""
    with tempfile.TemporaryDirectory(prefix="llvlit-") as folder:
        try:
            Path(folder, "model.gguf").symlink_to(path.resolve())
        except OSError:  # a system without links
            shutil.copyfile(path, Path(folder, "model.gguf"))
        yield Path(folder)


@contextmanager
def _bar_of_weights(name: str) -> Iterator[None]:
    """A bar of ours in the place of the one that transformers shows, wherever it runs, while it reads weights."""
    from transformers import modeling_gguf_pytorch_utils as reader

    theirs = reader.tqdm
    reader.tqdm = lambda tensors, desc: progress(tensors, f"Converting {name}, once", total=len(tensors))
    try:
        yield
    finally:
        reader.tqdm = theirs
