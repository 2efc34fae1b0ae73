"""Configuration: published keys, overrides, paths, and one-line errors."""

import json
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest

from longlive.config import ROOT, InferenceConfig, ModelKwargs, Section, config_keys, load_config, setting, to_dict
from longlive.errors import InputError
from longlive.models.attention import BACKENDS

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULT = CONFIGS / "longlive_inference.yaml"

# Keys and values of the published inference configurations.
PUBLISHED: dict[str, Any] = {
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "num_frame_per_block": 3,
    "model_name": "Wan2.1-T2V-1.3B",
    "model_kwargs": {"local_attn_size": 12, "timestep_shift": 5.0, "sink_size": 3},
    "data_path": "longlive_models/prompts/vidprom_filtered_extended.txt",
    "output_folder": "videos/long",
    "inference_iter": -1,
    "num_output_frames": 120,
    "use_ema": False,
    "seed": 0,
    "num_samples": 1,
    "save_with_index": True,
    "global_sink": True,
    "context_noise": 0,
    "generator_ckpt": "longlive_models/models/longlive_base.pt",
    "lora_ckpt": "longlive_models/models/lora.pt",
    "adapter": {
        "type": "lora",
        "rank": 256,
        "alpha": 256,
        "dropout": 0.0,
        "dtype": "bfloat16",
        "verbose": False,
    },
}
INFINITY = {
    "model_kwargs": {**PUBLISHED["model_kwargs"], "use_infinite_attention": True},
    "num_output_frames": 1920,
    "output_folder": "videos/long_infinity",
}
INTERACTIVE = {
    "switch_frame_indices": "40, 80, 120, 160, 200",
    "num_output_frames": 240,
    "seed": 1,
    "output_folder": "videos/interactive",
}
OTHER_RELEASE = {**INTERACTIVE, "num_frame_per_block": 6, "switch_frame_indices": "48, 96", "num_output_frames": 144}


def load(*overrides: str, path: Path = DEFAULT) -> InferenceConfig:
    return load_config(InferenceConfig, path, overrides)[0]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(*overrides: str, path: Path = DEFAULT) -> str:
    with pytest.raises(InputError) as caught:
        load(*overrides, path=path)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("changes", [{}, INFINITY, INTERACTIVE, OTHER_RELEASE])
def test_published_files_are_accepted_unchanged(tmp_path: Path, changes: dict[str, Any]) -> None:
    published = {**PUBLISHED, **changes}
    config = load(path=written(tmp_path, json.dumps(published)))
    expected = dict(published)
    for key in ("data_path", "output_folder", "generator_ckpt", "lora_ckpt"):
        expected[key] = str(ROOT / published[key])
    if "switch_frame_indices" in published:
        expected["switch_frame_indices"] = tuple(int(i) for i in published["switch_frame_indices"].split(","))
    expected["denoising_step_list"] = tuple(published["denoising_step_list"])
    expected["model_kwargs"] = {"use_infinite_attention": False, **published["model_kwargs"]}
    actual = to_dict(config)
    assert {key: actual[key] for key in expected} == expected


def test_switch_indices_in_the_published_spelling(tmp_path: Path) -> None:
    assert load(path=written(tmp_path, "switch_frame_indices:  48, 96\n")).switch_frame_indices == (48, 96)
    assert load(path=written(tmp_path, "switch_frame_indices: [48, 96]\n")).switch_frame_indices == (48, 96)
    assert load(path=written(tmp_path, "switch_frame_indices: 48\n")).switch_frame_indices == (48,)
    assert load(path=written(tmp_path, "switch_frame_indices: []\n")).switch_frame_indices == ()


@pytest.mark.parametrize(
    ("name", "changes", "data"),
    [
        ("longlive_inference.yaml", {}, "example/long_example.txt"),
        ("longlive_inference_infinity.yaml", INFINITY, "example/long_example.txt"),
        # Switches are ours to spread: the published list fits files of six prompts a line only.
        (
            "longlive_interactive_inference.yaml",
            {**INTERACTIVE, "switch_frame_indices": ""},
            "example/interactive_example.jsonl",
        ),
    ],
)
def test_our_files_say_what_the_published_ones_say(
    tmp_path: Path, name: str, changes: dict[str, Any], data: str
) -> None:
    published = {**PUBLISHED, **changes, "data_path": data}
    assert load(path=CONFIGS / name) == load(path=written(tmp_path, json.dumps(published)))


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    config = load(path=written(tmp_path, "# nothing\n"))
    keys = config_keys(InferenceConfig).values()
    paths = {key.name: str(ROOT / key.default) for key in keys if key.path and key.default}
    assert to_dict(config) == to_dict(InferenceConfig()) | paths


def test_overrides_replace_the_file_and_are_reported() -> None:
    overrides = ["model_kwargs.sink_size=6", "global_sink=false", "seed=1", "seed=7", "lora_ckpt=null", "fps=24"]
    config, explicit = load_config(InferenceConfig, DEFAULT, overrides)
    assert config.model_kwargs == ModelKwargs(sink_size=6)
    assert (config.global_sink, config.seed, config.lora_ckpt, config.fps) == (False, 7, None, 24)
    assert explicit == {"model_kwargs.sink_size", "global_sink", "seed", "lora_ckpt", "fps"}


@pytest.mark.parametrize("text", ["1000, 500", "1000,500", "[1000,500]", "[1000, 500]"])
def test_lists_on_the_command_line(text: str) -> None:
    assert load(f"denoising_step_list={text}").denoising_step_list == (1000, 500)


@pytest.mark.parametrize(
    "text", ["A cat: it walks, a=b", "[wow] {really}", "2024", "true", "cost ${x} $5", "'quoted' # 1"]
)
def test_a_prompt_is_taken_as_it_stands(text: str) -> None:
    assert load(f"prompt={text}").prompt == text


def test_prompts_are_separated_by_a_lone_bar() -> None:
    assert load("prompt=a cat | a dog |  a|b ").prompts == ("a cat", "a dog", "a|b")
    assert load().prompts == ()
    for text in (" ", "a | ", "| a", "a | | b"):
        assert "' | '" in message(f"prompt={text}")


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    file = written(tmp_path, f"data_path: mine.txt\nlora_ckpt: {tmp_path}/lora.pt\ngenerator_ckpt: ~/base.pt\n")
    config = load("output_folder=out", "start_from=~nobody-here/x.png", path=file)
    assert config.data_path == str(ROOT / "mine.txt")
    assert config.lora_ckpt == str(tmp_path / "lora.pt")
    assert config.generator_ckpt == "/home/someone/base.pt"
    assert config.output_folder == str(tmp_path / "out")
    assert config.start_from == str(tmp_path / "~nobody-here/x.png")
    assert config.wan_folder == str(ROOT / "wan_models")
    assert Path(__file__).parents[1] == ROOT


def test_the_sidecar_form_reads_back(tmp_path: Path) -> None:
    config = load("prompt=a ${x} | b", "output_folder=${y}", "switch_frame_indices=3", "num_output_frames=6")
    assert load(path=written(tmp_path, json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("num_ouput_frames", "num_output_frames"),
        ("model_kwargs.sink_sise", "model_kwargs.sink_size"),
        ("sink_size", "model_kwargs.sink_size"),
        ("adapter.rnk", "adapter.rank"),
        ("Seed", "seed"),
        ("dtyp", "dtype"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path: Path, typed: str, nearest: str) -> None:
    expected = f"unknown key '{typed}'; did you mean '{nearest}'?"
    assert message(f"{typed}=3") == f"command line: {expected}"
    section, _, leaf = typed.rpartition(".")
    file = written(tmp_path, json.dumps({section: {leaf: 3}} if section else {leaf: 3}))
    assert message(path=file) == f"{file}: {expected}"


def test_keys_like_no_other_point_to_the_help() -> None:
    assert "unknown key 'xyzzy'; did you mean '" in message("xyzzy=1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "'seed': settings are written key=value"),
        ("seed=", "'seed=': settings are written key=value"),
        ("=3", "'=3': settings are written key=value"),
        ("model_kwargs=3", "'model_kwargs' is a section of keys: model_kwargs.local_attn_size"),
        ("batch_size=two", "batch_size=two: must be of type int"),
        ("batch_size=1.5", "batch_size=1.5: must be of type int"),
        ("batch_size=null", "batch_size=null: must be of type int"),
        ("use_ema=maybe", "use_ema=maybe: must be of type bool"),
        ("model_kwargs.timestep_shift=x", "model_kwargs.timestep_shift=x: must be of type float"),
        ("switch_frame_indices=3,x", "switch_frame_indices=3,x: must be of type list of int"),
        ("prompt=???", "prompt=???: must be of type str or null"),
        ("seed=${fps}", "seed=${fps}: must be of type int"),
    ],
)
def test_wrong_overrides(override: str, words: str) -> None:
    assert message(override).startswith(f"command line: {words}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("height=481", "multiple of 16"),
        ("width=0", "multiple of 16"),
        ("model_kwargs.sink_size=-1", "at least 0"),
        ("model_kwargs.local_attn_size=0", "-1 or at least 1"),
        ("model_kwargs.local_attn_size=-2", "-1 or at least 1"),
        ("model_kwargs.local_attn_size=5", "least sink_size + num_frame_per_block = 3 + 3"),
        ("model_kwargs.sink_size=10", "local_attn_size=12: must be -1 or hold the sink and one block"),
        ("model_kwargs.timestep_shift=0", "positive"),
        ("model_kwargs.timestep_shift=nan", "positive"),
        ("model_kwargs.timestep_shift=inf", "positive"),
        ("denoising_step_list=[]", "decreasing"),
        ("denoising_step_list=1000,1000", "decreasing"),
        ("denoising_step_list=1001,5", "decreasing"),
        ("denoising_step_list=1000,500,0", "remove it"),
        ("context_noise=-1", "between 0 and 1000"),
        ("num_output_frames=0", "at least 1"),
        ("num_output_frames=121", "multiple of num_frame_per_block=3; nearest: 120 or 123"),
        ("num_output_frames=2", "multiple of num_frame_per_block=3; nearest: 3"),
        ("num_frame_per_block=0", "at least 1"),
        ("num_samples=0", "at least 1"),
        ("batch_size=0", "at least 1"),
        ("inference_iter=-2", "-1 or at least 1"),
        ("inference_iter=0", "-1 or at least 1"),
        ("fps=0", "at least 1"),
        ("crf=52", "between 0 and 51"),
        ("seed=-1", "between 0 and 9223372036854775807"),
        ("seed=9223372036854775808", "between 0 and 9223372036854775807"),
        ("adapter.rank=0", "at least 1"),
        ("adapter.alpha=0", "positive"),
        ("adapter.type=dora", "one of lora"),
        ("adapter.dropout=2", "between 0 and 1"),
        ("switch_frame_indices=-3,3", "increasing"),
        ("switch_frame_indices=6,6", "increasing"),
        ("device=gpu", "cuda:N"),
        ("device=cuda:x", "cuda:N"),
        ("dtype=fp8", "one of auto, bfloat16"),
        ("attention=sdap", "one of auto, sdpa"),
    ],
)
def test_impossible_values(override: str, words: str) -> None:
    text = message(override)
    assert words in text
    assert override.partition("=")[0].rpartition(".")[2] in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["model_kwargs.local_attn_size=-1", "model_kwargs.sink_size=30"],
        ["model_kwargs.local_attn_size=6"],
        ["num_frame_per_block=1", "num_output_frames=7"],
        ["switch_frame_indices=0,3"],
        ["inference_iter=1"],
        ["seed=9223372036854775807"],
        ["device=cuda:3"],
        ["denoising_step_list=1000"],
        ["height=16", "width=16"],
    ],
)
def test_possible_values_at_the_edge(overrides: list[str]) -> None:
    load(*overrides)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nfps: [", " line 3: not valid YAML"),
        ("seed: 1\nseed: 2\n", " line 2: not valid YAML: found duplicate key"),
        ("- 1\n", " must consist of lines `key: value`"),
        ("42\n", " cannot read"),
        ("seed: ${fps}\n", " seed=${fps}: must be of type int"),
        ("prompt: ${\n", " "),
        ("seed: x\n", " seed=x: must be of type int"),
        ("seed: true\n", " seed=true: must be of type int"),
        ("seed: {a: 1}\n", " unknown key 'seed.a'; did you mean 'seed'?"),
        ("adapter:\n", " 'adapter' is a section of keys"),
        ("denoising_step_list: [1, a]\n", ' denoising_step_list=[1, "a"]: must be of type list of int'),
        ("prompt: [a]\n", ' prompt=["a"]: must be of type str or null'),
        ("height: 7\n", " height=7: must be a positive multiple of 16"),
        ("seed: \x07\n", " not valid YAML"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, text)
    assert message(path=path).startswith(f"{path}:{words}")


def test_unreadable_files(tmp_path: Path) -> None:
    assert message(path=tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: cannot read: No such file or directory"
    assert message(path=tmp_path) == f"{tmp_path}: cannot read: Is a directory"
    (tmp_path / "latin.yaml").write_bytes(b"prompt: caf\xe9\n")
    assert message(path=tmp_path / "latin.yaml") == f"{tmp_path}/latin.yaml: not a UTF-8 text file"


def test_a_wrong_value_in_the_file_may_be_replaced(tmp_path: Path) -> None:
    assert load("height=32", path=written(tmp_path, "height: 31\n")).height == 32


def test_constructing_checks_too() -> None:
    with pytest.raises(InputError, match="sink_size=-1: must be at least 0"):
        ModelKwargs(sink_size=-1)
    with pytest.raises(InputError, match="nearest: 3 or 6"):
        InferenceConfig(num_output_frames=4)
    with pytest.raises(FrozenInstanceError):
        InferenceConfig().seed = 3  # type: ignore[misc]


def test_every_key_has_a_help_text_and_every_attention_kernel_is_accepted() -> None:
    assert all(key.help for key in config_keys(InferenceConfig).values())
    for name in BACKENDS:
        assert load(f"attention={name}").attention == name


@dataclass(frozen=True)
class Part:
    """A part's own dataclass, which knows nothing of configurations."""

    rate: float = 0.5


@dataclass(frozen=True)
class OtherSchema(Section):
    steps: int
    part: Part = Part()
    names: tuple[str, ...] = setting(("a",), "names")


def test_any_schema_can_be_loaded(tmp_path: Path) -> None:
    file = written(tmp_path, "part: {rate: 1}\n")
    config, explicit = load_config(OtherSchema, file, ["steps=3", "names=b, ${c}"])
    assert config == OtherSchema(3, Part(1.0), ("b", "${c}"))
    assert explicit == {"steps", "names"}
    with pytest.raises(InputError, match="steps is not given"):
        load_config(OtherSchema, file)
