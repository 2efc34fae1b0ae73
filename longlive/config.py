"""Typed, strict configuration: defaults, then a YAML file, then `key=value` from the command line.

Every key is a field of a frozen dataclass, which owns its type, default, help text and accepted values; nested keys
are written with a dot (`model_kwargs.sink_size`). `load_config` works for any such dataclass and turns every mistake
into an `InputError` that says where the value came from. The only importer of OmegaConf, which converts the types.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from longlive.errors import InputError

_CHECKOUT = Path(__file__).resolve().parents[1]
ROOT = _CHECKOUT if (_CHECKOUT / "configs" / "longlive_inference.yaml").is_file() else Path.cwd()
PATH_RULE = (
    "Relative paths typed on the command line are relative to the working directory; "
    "those in a configuration file, and the defaults, are relative to the repository."
)


@dataclass(frozen=True)
class Rule:
    """Which values a key accepts: in words, and as a predicate."""

    accepts: str
    ok: Callable[[Any], bool]


def at_least(low: int) -> Rule:
    return Rule(f"at least {low}", lambda value: value >= low)


def between(low: float, high: float) -> Rule:
    return Rule(f"between {low} and {high}", lambda value: low <= value <= high)


def one_of(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


MULTIPLE_OF_16 = Rule("a positive multiple of 16", lambda value: value > 0 and value % 16 == 0)
POSITIVE = Rule("a positive number", lambda value: 0 < value < math.inf)
DTYPES = ("bfloat16", "float16", "float32")
DEVICE = Rule("auto, cpu, cuda or cuda:N", lambda value: re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None)
FRAME_NUMBERS = Rule("increasing frame numbers from 0", lambda value: _increases((-1, *value)))
STEPS = Rule(
    "decreasing numbers in 1000..1 (a last 0 has nothing left to denoise: remove it)",
    lambda value: len(value) > 0 and _increases((0, *reversed(value), 1001)),
)


def _show(value: Any) -> str:
    """A value on one line, as a configuration file would spell it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


@dataclass(frozen=True)
class Key:
    """One configuration key: dotted name, type, default, and what the field says about it."""

    name: str
    type: Any
    default: Any
    help: str = ""
    rule: Rule | None = None
    path: bool = False

    def check(self, value: Any, source: str = "") -> None:
        """Raise InputError unless the key accepts this value, which is of its type already."""
        if value is not None and self.rule is not None and not self.rule.ok(value):
            raise InputError(f"{source}{self.name}={_show(value)}: must be {self.rule.accepts}")

    @property
    def default_text(self) -> str:
        """The default as a configuration file would spell it, or `required`."""
        return "required" if self.default is MISSING else _show(self.default)

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is tuple

    @property
    def type_name(self) -> str:
        if self.is_list:
            return f"list of {get_args(self.type)[0].__name__}"
        return " or ".join("null" if kind is NoneType else kind.__name__ for kind in get_args(self.type) or [self.type])


def config_keys(schema: type, prefix: str = "") -> dict[str, Key]:
    """Every key of a configuration dataclass by its dotted name, those of nested sections included."""
    keys: dict[str, Key] = {}
    types = get_type_hints(schema)
    for item in fields(schema):
        name = prefix + item.name
        if is_dataclass(types[item.name]):
            keys |= config_keys(types[item.name], f"{name}.")
        else:
            keys[name] = Key(name, types[item.name], item.default, **item.metadata)
    return keys


def setting(default: Any, help: str, rule: Rule | None = None, *, path: bool = False) -> Any:
    """A dataclass field with its help text, its rule, and whether it names a file or folder (see `PATH_RULE`)."""
    return field(default=default, metadata={"help": help, "rule": rule, "path": path})


@dataclass(frozen=True)
class Section:
    """Base of configuration dataclasses: constructing one checks every field against its rule."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if not is_dataclass(item.type):
                Key(item.name, item.type, item.default, **item.metadata).check(getattr(self, item.name))


def check_used(explicit: frozenset[str], unused: frozenset[str], why: str) -> None:
    """Raise InputError where the command line sets a key that a command has taken over from another and does not use.

    why: to which command it means nothing, and what holds instead.
    """
    for name in sorted(explicit & unused):
        raise InputError(f"command line: {name} means nothing {why}")


@dataclass(frozen=True)
class ModelKwargs(Section):
    """What the generator attends to, in latent frames, and its noise schedule."""

    local_attn_size: int = setting(
        12,
        "latent frames that attention sees: the sink and the newest ones; -1 = all",
        Rule("-1 or at least 1", lambda value: value == -1 or value >= 1),
    )
    sink_size: int = setting(3, "first latent frames of the video that stay visible for ever", at_least(0))
    timestep_shift: float = setting(5.0, "warp of the noise schedule; larger = more steps at high noise", POSITIVE)
    use_infinite_attention: bool = setting(False, "positions relative to the window: unlimited length")

    def check_window(self, block: int) -> None:
        """Raise InputError unless the window holds the sink and a block of this many latent frames."""
        if -1 != self.local_attn_size < self.sink_size + block:
            raise InputError(
                f"model_kwargs.local_attn_size={self.local_attn_size}: must be -1 or hold the sink and one block, at "
                f"least sink_size + num_frame_per_block = {self.sink_size} + {block}"
            )


@dataclass(frozen=True)
class AdapterSettings(Section):
    """How the LoRA of `lora_ckpt` was made. Published keys that mean nothing here are accepted as well."""

    type: str = setting("lora", "kind of adapter", one_of("lora"))
    rank: int = setting(256, "LoRA rank", at_least(1))
    alpha: float = setting(256.0, "LoRA scale is alpha / rank", POSITIVE)
    dropout: float = setting(0.0, "published, without effect", between(0, 1))
    dtype: str = setting("bfloat16", "published, without effect", one_of(*DTYPES))
    verbose: bool = setting(False, "published, without effect")


@dataclass(frozen=True)
class InferenceConfig(Section):
    """Everything the inference commands can be told. One latent frame is 4 video frames (the first one is 1)."""

    data_path: str = setting(
        "example/long_example.txt", "prompts: .txt (one per line) or .jsonl (several per video)", path=True
    )
    prompt: str | None = setting(
        None,
        "one video of this text, instead of data_path; ' | ' separates prompts shown one after the other",
        Rule("text, or texts separated by ' | ', none of them empty", lambda value: all(split_prompts(value))),
    )
    start_from: str | None = setting(None, "picture or clip that the video continues", path=True)
    output_folder: str = setting("videos/long", "where the videos go", path=True)
    overwrite: bool = setting(False, "make videos again that exist already, instead of skipping them")
    save_with_index: bool = setting(True, "file names by prompt number; false = by the prompt's words")
    contact_sheet: bool = setting(True, "also write a PNG with frames of the video")
    animation: bool = setting(False, "also write an animated WebP, which web pages show like a picture")
    inference_iter: int = setting(
        -1,
        "how many prompts of data_path to run; -1 = all",
        Rule("-1 or at least 1", lambda value: value == -1 or value >= 1),
    )
    num_samples: int = setting(1, "videos per prompt, each with its own noise", at_least(1))
    seed: int = setting(0, "seed of the noise", between(0, 2**63 - 1))
    batch_size: int = setting(1, "videos made at the same time", at_least(1))

    num_output_frames: int = setting(
        120, "length in latent frames (120 = 477 video frames); a multiple of num_frame_per_block", at_least(1)
    )
    height: int = setting(480, "pixels", MULTIPLE_OF_16)
    width: int = setting(832, "pixels", MULTIPLE_OF_16)
    fps: int = setting(16, "video frames per second of the file; the models are made for 16", at_least(1))
    crf: int = setting(18, "H.264 quality: 0 = lossless, 51 = worst", between(0, 51))
    switch_frame_indices: tuple[int, ...] = setting(
        (), "latent frames at which the next prompt takes over, where the prompt file does not say", FRAME_NUMBERS
    )
    global_sink: bool = setting(True, "a prompt switch keeps the sink; false = renews it")

    model_name: str = setting("Wan2.1-T2V-1.3B", "folder of the Wan model inside wan_folder")
    wan_folder: str = setting("wan_models", "folder of the Wan models", path=True)
    generator_ckpt: str | None = setting(None, "generator weights; null = those of the Wan model", path=True)
    lora_ckpt: str | None = setting(None, "LoRA weights on top; null = none", path=True)
    vae_ckpt: str | None = setting(None, "VAE weights; null = those of the Wan model", path=True)
    merge_lora: bool = setting(True, "add the LoRA to the weights at load: faster, same video up to rounding")
    use_ema: bool = setting(False, "take the averaged weights (generator_ema) from generator_ckpt")
    adapter: AdapterSettings = AdapterSettings()
    model_kwargs: ModelKwargs = ModelKwargs()

    num_frame_per_block: int = setting(3, "latent frames made at a time", at_least(1))
    denoising_step_list: tuple[int, ...] = setting(
        (1000, 750, 500, 250), "noise levels of the denoising steps of a block, of 1000; one pass each", STEPS
    )
    warp_denoising_step: bool = setting(True, "warp denoising_step_list by timestep_shift")
    context_noise: int = setting(0, "timestep at which finished frames enter the cache", between(0, 1000))

    device: str = setting("auto", "auto = cuda where there is one", DEVICE)
    dtype: str = setting("auto", "auto = bfloat16 on cuda, float32 on cpu", one_of("auto", *DTYPES))
    attention: str = setting("auto", "attention kernel", one_of("auto", "sdpa", "cudnn", "flash2", "flash3"))
    compile: bool = setting(False, "compile the models first: slow to start, then faster")
    low_memory: bool = setting(False, "keep the text encoder off the GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        block, frames, model = self.num_frame_per_block, self.num_output_frames, self.model_kwargs
        if frames % block:
            below = frames - frames % block
            nearest = " or ".join(str(value) for value in (below, below + block) if value)
            raise InputError(
                f"num_output_frames={frames}: must be a multiple of num_frame_per_block={block}; nearest: {nearest}"
            )
        model.check_window(block)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts in `prompt`, one after the other; empty where data_path is to be read."""
        return () if self.prompt is None else split_prompts(self.prompt)


def split_prompts(text: str) -> tuple[str, ...]:
    """Texts separated by a `|` that stands alone between spaces."""
    return tuple(part.strip() for part in re.split(r"(?<!\S)\|(?!\S)", text))


def _increases(values: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(values))


Config = TypeVar("Config", bound=Section)


Values = dict[str, Any]
"""Values by dotted name, as a file or the command line gives them."""


def load_config(
    schema: type[Config],
    path: str | Path,
    overrides: Sequence[str] = (),
    translate: Callable[[Values], Values] = lambda values: values,
) -> tuple[Config, frozenset[str]]:
    """The defaults of `schema`, changed by the YAML file at `path`, then by the `key=value` texts in `overrides`.

    Returns the configuration and the dotted keys that `overrides` names. An override is not YAML: a string is taken as
    it stands, a list is `1, 2` or `[1, 2]`, `null` is null. Paths are made absolute by `PATH_RULE`. translate: turns
    other names for keys into ours, in either source.
    Raises InputError, one line, for an unreadable file, an unknown key, a wrong type or an impossible value.
    """
    keys = config_keys(schema)
    in_file, typed = translate(dict(_flatten(_read_yaml(Path(path))))), translate(_parse_overrides(overrides))
    merged = OmegaConf.structured(schema)
    for source, values in ((f"{path}: ", in_file), ("command line: ", typed)):
        for name, value in values.items():
            merged = _merge(merged, _find_key(keys, name, source), value, source)
    plain = dict(_flatten(cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))))
    for name, key in keys.items():
        source = "command line: " if name in typed else f"{path}: "
        if OmegaConf.is_missing(merged, name):
            raise InputError(f"{source}{name} is not given")
        key.check(plain[name], source)
        if key.path and plain[name] is not None:
            base = Path.cwd() if name in typed else ROOT
            merged = _merge(merged, key, str(base / os.path.expanduser(plain[name])), source)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, schema)
    return config, frozenset(typed)


def to_dict(config: Section) -> dict[str, Any]:
    """The configuration as nested dictionaries, for JSON; as a file, `load_config` reads it back unchanged."""
    return asdict(config)


def to_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as the text of a file that `load_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal_tree(settings)))


def _read_yaml(path: Path) -> Mapping[Any, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{path}:{line} not valid YAML: {reason}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, Mapping):
        raise InputError(f"{path}: must consist of lines `key: value`")
    return tree


def _parse_overrides(overrides: Sequence[str]) -> Values:
    values: Values = {}
    for text in overrides:
        name, separator, value = text.partition("=")
        if not (name and separator and value):
            raise InputError(f"command line: '{text}': settings are written key=value (key=null for none)")
        values[name] = None if value == "null" else value
    return values


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with their dotted names; a list is a leaf."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _find_key(keys: Mapping[str, Key], name: str, source: str) -> Key:
    if name in keys:
        return keys[name]
    inside = [key for key in keys if key.startswith(f"{name}.")]
    if inside:
        raise InputError(f"{source}'{name}' is a section of keys: {', '.join(inside)}")
    spellings = {key.rpartition(".")[2]: key for key in keys} | {key: key for key in keys}
    nearest = difflib.get_close_matches(name, spellings, n=1, cutoff=0)[0]
    raise InputError(f"{source}unknown key '{name}'; did you mean '{spellings[nearest]}'?")


def _merge(config: Any, key: Key, value: Any, source: str) -> Any:
    """A copy of `config` with the value, in the key's type; a list may be given as text."""
    given = value
    if key.is_list and isinstance(value, str | int):
        inner = str(value).strip().removeprefix("[").removesuffix("]")
        given = [item.strip() for item in inner.split(",")] if inner.strip() else []
    wrong = InputError(f"{source}{key.name}={_show(value)}: must be of type {key.type_name}")
    is_text = str in (key.type, *get_args(key.type))
    if value == "???" or (isinstance(value, str) and "${" in value and not is_text):
        raise wrong  # OmegaConf would take these for "not given" and for a reference, and not convert them
    change = OmegaConf.create()
    OmegaConf.update(change, key.name, _literal(given))
    try:
        return OmegaConf.merge(config, change)
    except OmegaConfBaseException as error:
        raise wrong from error


def _literal_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _literal_tree(v) if isinstance(v, Mapping) else _literal(v) for key, v in tree.items()}


def _literal(value: Any) -> Any:
    """The value with `${` escaped, so that OmegaConf sees text and no reference."""
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value
