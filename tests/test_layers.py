"""The import layers: what a module of `longlive` may import, read from its source.

A unit is a module or folder directly in `longlive/`. It imports from lower layers and from itself; single modules of
one layer may also import each other, since `longlive/` is their own folder.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "longlive"
LAYERS = (
    ("__init__", "errors", "flow", "distributed"),
    ("models",),
    ("rollout", "graphs", "quantize", "weights", "data"),
    ("inference", "training"),
    (
        *("builtin", "config", "build"),
        *("train_config", "train_inputs", "train_world", "train_build", "train_samples", "train"),
        *("clips_config", "make_clips"),
    ),
    ("eval", "web"),
    ("cli", "__main__"),
)
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
# Libraries with one way in.
OWNERS = {"omegaconf": "config.py", "flash_attn": "models/attention.py", "flash_attn_interface": "models/attention.py"}


def imports(tree: ast.AST, folder: list[str]) -> list[list[str]]:
    """The dotted names a module imports, split; `folder` is where it stands, as in ["longlive", "models"]."""
    found: list[list[str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found += [[*base, alias.name] for alias in node.names]
    return found


def calls_print(tree: ast.AST) -> bool:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Name) and function.id == "print" for function in calls)


def violations(package: Path) -> list[str]:
    """One line for each broken rule in the package folder."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        *folders, stem = name.removesuffix(".py").split("/")
        unit = (folders or [stem])[0]
        if unit not in LAYER:
            found.append(f"{name}: give {unit} a layer in {Path(__file__).name}")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for top, *rest in imports(tree, ["longlive", *folders]):
            if OWNERS.get(top, name) != name:
                found.append(f"{name}: imports {top}, which only {OWNERS[top]} may")
            if top != "longlive":
                continue
            target = rest[0] if rest and rest[0] in LAYER else "__init__"
            is_beside = LAYER[target] == LAYER[unit] and not folders and not (package / target).is_dir()
            if target != unit and not is_beside and LAYER[target] >= LAYER[unit]:
                found.append(f"{name}: imports {target}, which is not in a lower layer")
        if calls_print(tree):
            found.append(f"{name}: calls print; use logging")
    return found


def test_package_keeps_its_layers() -> None:
    assert (PACKAGE / "errors.py").exists()
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("flow.py", "from longlive.models import dit"),
        ("models/dit.py", "import longlive.rollout"),
        ("models/dit.py", "from ..rollout import recache"),
        ("models/dit.py", "def late():\n    from longlive import config"),
        ("rollout.py", "from longlive.weights.files import load"),
        ("weights/files.py", "from longlive.rollout import recache"),
        ("training/trainer.py", "from longlive.inference.session import Session"),
        ("inference/session.py", "from longlive.training import dmd"),
        ("build.py", "from omegaconf import OmegaConf"),
        ("models/dit.py", "from flash_attn.flash_attn_interface import flash_attn_func"),
        ("cli.py", "print('hello')"),
        ("helpers.py", "x = 1"),
    ],
)
def test_violation_is_found(tmp_path: Path, name: str, source: str) -> None:
    for folder in ("models", "weights", "inference", "training"):
        (tmp_path / folder).mkdir()
    (tmp_path / name).write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("flow.py", "import torch\nfrom longlive.errors import InputError"),
        ("models/dit.py", "from longlive.models.rope import apply_rope\nfrom . import kv_cache\nfrom .. import flow"),
        ("models/attention.py", "from flash_attn import flash_attn_func"),
        ("config.py", "from omegaconf import OmegaConf\nfrom longlive.build import build"),
        ("inference/session.py", "from longlive import __version__\nfrom longlive.rollout import recache"),
        ("cli.py", "from longlive.web import serve"),
    ],
)
def test_allowed_import_passes(tmp_path: Path, name: str, source: str) -> None:
    for folder in ("models", "inference", "web"):
        (tmp_path / folder).mkdir()
    (tmp_path / name).write_text(source)
    assert violations(tmp_path) == []
