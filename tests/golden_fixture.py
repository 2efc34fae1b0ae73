"""Reads a folder of golden fixtures (see the README in that folder) and compares with it.

Nothing about sizes is assumed: models, variants, settings and tolerances come from the files. The folder is
`$LONGLIVE_GOLDEN`, by default `../shared/golden` beside the repository; tests are skipped where it is absent.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("LONGLIVE_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


class Case:
    """One case folder: `config`, inputs, model weights, and `check` against the expected outputs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec: dict[str, Any] = json.loads((path / "case.json").read_text())
        self.config: dict[str, Any] = self.spec["config"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path / "tensors.safetensors")

    @property
    def outputs(self) -> list[str]:
        """Names of the expected outputs, without the leading `out.`."""
        return [name.removeprefix("out.") for name in self.spec["tensors"] if name.startswith("out.")]

    def input(self, name: str) -> Tensor:
        """Input `in.<name>`, from the case or from the shared file; float16 storage becomes float32."""
        key = f"in.{name}"
        external = self.spec.get("external_tensors", {}).get(key)
        if external is None:
            tensor = self.tensors[key]
        else:
            tensor = load_file(self.path / external["file"])[external["name"]]
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    def expected(self, name: str) -> Tensor:
        return self.tensors[f"out.{name}"]

    def weights(self, model: str) -> dict[str, Tensor]:
        """Float32 weights of the model the case calls `model`, under their original names."""
        relative = self.spec["models"][model]
        return {name: tensor.float() for name, tensor in load_file(self.path / relative).items()}

    def check(self, name: str, actual: Tensor) -> None:
        """Fail unless `actual` agrees with output `name`: equal for integers, within its `atol` for floats."""
        expected = self.expected(name)
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
        actual = actual.detach().cpu()
        if not expected.is_floating_point():
            assert torch.equal(actual.to(expected.dtype), expected), name
            return
        assert torch.isfinite(actual).all(), f"{name}: not finite"
        error = (actual.double() - expected.double()).abs().max().item()
        atol = self.spec["tensors"][f"out.{name}"]["atol"]
        assert error <= atol, f"{name}: max error {error:.3g} > atol {atol:.3g}"


def load_case(name: str) -> Case:
    """The case folder called `name`; skips the test where the folder has none."""
    path = FOLDER / name
    if not (path / "case.json").exists():
        pytest.skip(f"no golden fixture {path}")
    return Case(path)


def variants(name: str) -> list[Any]:
    """Pytest parameters, one per variant of a case, without those that document a published fault."""
    path = FOLDER / name / "case.json"
    if not path.exists():
        reason = f"no golden fixture {FOLDER / name}"
        return [pytest.param("absent", marks=pytest.mark.skip(reason=reason))]
    found = json.loads(path.read_text())["config"]["variants"]
    return [pytest.param(key, id=key) for key, value in found.items() if "published_fault" not in value]
