"""Reads a folder of golden fixtures (see the README in that folder) and compares with it.

Nothing is assumed about sizes, nor about the names of case folders beyond their number, the kind of case: models,
variants, settings and tolerances come from the files. The folder is `$LONGLIVE_GOLDEN`, by default `../shared/golden`
beside the repository; the tests of kinds that it lacks are skipped.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("LONGLIVE_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
KINDS = ("01", "02", "03", "04", "05", "06", "07", "08", "08b", "09", "10", "11", "12")


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

    @property
    def variants(self) -> list[str]:
        """Names of the variants, without those that document a published fault."""
        return [name for name, variant in self.config["variants"].items() if "published_fault" not in variant]

    def settings(self, variant: str) -> dict[str, Any]:
        """The config as it holds for a variant."""
        return self.config | self.config["variants"][variant]

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

    def check_all(self, prefix: str, found: dict[str, Tensor]) -> None:
        """Check every output `<prefix><name>` against `found[name]`; fail where `found` lacks one.

        `_lastN` and `_lastNblocks` hold the newest frames only. Where gradients are stored twice, those of a cache that
        passes none (`detached_grad`) count.
        """
        outputs = [output for output in self.outputs if output.startswith(prefix)]
        assert outputs, f"{self.path.name}: no outputs {prefix}*"
        for output in outputs:
            name = output.removeprefix(prefix)
            if "grad" in name and prefix + name.replace("grad", "detached_grad", 1) in outputs:
                continue
            name = name.replace("detached_grad", "grad")
            base = re.sub(r"_last\d+(blocks)?$", "", name)
            assert name in found or base in found, f"{self.path.name}: output {output} is not tested"
            self.check(output, found[name] if name in found else found[base][:, -self.expected(output).shape[1] :])


def kind_of(folder: Path) -> str:
    """The number (and letter) that the name of a case folder begins with; empty for other folders."""
    match = re.match(r"\d\d[a-z]?(?=_|$)", folder.name)
    return match[0] if match else ""


def case_folders(kind: str) -> list[Path]:
    """All case folders of a kind: there may be several."""
    assert kind in KINDS, kind
    return [path.parent for path in sorted(FOLDER.glob("*/case.json")) if kind_of(path.parent) == kind]


def absent(kind: str, *values: None) -> Any:
    return pytest.param(
        *values, id=f"{kind}-absent", marks=pytest.mark.skip(reason=f"no golden case {kind} in {FOLDER}")
    )


def cases(kind: str) -> list[Any]:
    """Pytest parameters, one per case folder of a kind; one skipped parameter where there is none."""
    return [pytest.param(folder, id=folder.name) for folder in case_folders(kind)] or [absent(kind, None)]


def parts(kind: str, names: Callable[[Case], Iterable[str]]) -> list[Any]:
    """Pytest parameters (case folder, name), one per name that `names` finds in each case of a kind."""
    found = [(folder, name) for folder in case_folders(kind) for name in names(Case(folder))]
    return [pytest.param(*part, id=f"{part[0].name}-{part[1]}") for part in found] or [absent(kind, None, None)]


def variants(kind: str) -> list[Any]:
    """Pytest parameters (case folder, variant)."""
    return parts(kind, lambda case: case.variants)
