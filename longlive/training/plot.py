"""The curves of training runs, drawn from their `metrics.jsonl`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longlive.errors import InputError
from longlive.training.metrics import read_metrics
from longlive.weights.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMATS = (".png", ".pdf", ".svg")
_NETWORK_COLOURS = {"generator": "#2f6db5", "critic": "#e07b28"}
_COLOURS = ("#3a9a6d", "#8a5fb0", "#c94a53", "#4aa5b8", "#b39023", "#7a7a7a", "#d873a8", "#5b6b2f")
_UNITS = {"_s": "s", "_gb": "GB"}
_FIRST_QUANTITIES = ("loss", "grad_norm", "gradient", "timestep")
_MIN_POINTS_SMOOTHED = 30
_MAX_POINTS_SMOOTHED = 400


@dataclass
class _Curve:
    """One quantity over time; a step with several values stands there several times."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


# Title -> label -> curve.
_Panels = dict[str, dict[str, _Curve]]


def plot(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Draw the metrics of runs and return the picture's path.

    One run: a panel for each quantity with a line for each network, into its `curves.png` unless `out` says otherwise.
    Several: a panel for each metric with a line for each run, into `compared.png` of the first. `out` ends in .png,
    .pdf or .svg. Thin lines are the values, thick ones running means without
    outliers, dots the samples of a step, crosses at the top NaN and infinities. Raises
    `InputError` for a folder without metrics or a file that cannot be written.
    """
    out = out or runs[0] / ("curves.png" if len(runs) == 1 else "compared.png")
    if out.suffix not in _FORMATS:
        raise InputError(f"{out}: cannot draw such a file; accepted are {', '.join(_FORMATS)}")
    records = {name: read_metrics(run) for name, run in zip(_run_names(runs), runs, strict=True)}
    panels = _group_by_quantity(*records.values()) if len(records) == 1 else _group_by_metric(records)
    if not panels:
        raise InputError(f"{runs[0] / 'metrics.jsonl'}: holds no metrics yet")
    _draw(panels, " · ".join(records), out)
    return out


def _run_names(runs: Sequence[Path]) -> list[str]:
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _curves(records: Sequence[dict[str, Any]]) -> dict[str, _Curve]:
    """Metric -> its curve: losses and gradients first, the rest in the order of first appearance."""
    curves: dict[str, _Curve] = {}
    for record in records:
        for name, value in record.items():
            if name in ("step", "time"):
                continue
            values = value if isinstance(value, list) else [value]
            curve = curves.setdefault(name, _Curve())
            curve.steps += [record["step"]] * len(values)
            curve.values += values
    ranks = {quantity: rank for rank, quantity in enumerate(_FIRST_QUANTITIES)}
    return dict(sorted(curves.items(), key=lambda item: ranks.get(item[0].rpartition("/")[2], len(ranks))))


def _group_by_quantity(records: Sequence[dict[str, Any]]) -> _Panels:
    """A panel for each quantity with a line for each network; the parts of the time share one."""
    panels: _Panels = {}
    for name, curve in _curves(records).items():
        network, _, quantity = name.rpartition("/")
        if network == "time":
            network, quantity = quantity.removesuffix("_s").replace("_", " "), "time_s"
        panels.setdefault(quantity, {})[network] = curve
    # A single line needs no legend: its panel's title tells all.
    return {title if len(lines) > 1 else f"{next(iter(lines))}/{title}": lines for title, lines in panels.items()}


def _group_by_metric(runs: dict[str, list[dict[str, Any]]]) -> _Panels:
    """A panel for each metric with a line for each run."""
    panels: _Panels = {}
    for run, records in runs.items():
        for name, curve in _curves(records).items():
            panels.setdefault(name, {})[run] = curve
    return panels


def _draw(panels: _Panels, title: str, out: Path) -> None:
    # Not pyplot: a Figure alone draws without a display and leaves no global state. Imported late, since it is slow.
    from matplotlib.figure import Figure

    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(4.8 * num_columns, 0.6 + 2.9 * num_rows), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    labels = dict.fromkeys(label for lines in panels.values() for label in lines if label not in _NETWORK_COLOURS)
    colours = _NETWORK_COLOURS | {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(labels)}
    for number, (name, lines) in enumerate(panels.items(), start=1):
        _draw_panel(figure.add_subplot(num_rows, num_columns, number), name, lines, colours)
    figure.supxlabel("step", fontsize=10)
    with atomic_file(out) as file:
        figure.savefig(file, format=out.suffix[1:])


def _draw_panel(axes: "Axes", name: str, lines: dict[str, _Curve], colours: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    for label, curve in lines.items():
        _draw_curve(axes, label, curve, colours[label])
    if _may_span_decades(name) and _spans_decades(lines):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(_heading(name), fontsize=10, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8, length=0, which="both")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b0b0")
    if len(lines) > 1 or not any(label in name for label in lines):
        legend = axes.legend(fontsize=8, edgecolor="none", framealpha=0.75)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1)


def _draw_curve(axes: "Axes", label: str, curve: _Curve, colour: str) -> None:
    steps, values = np.array(curve.steps), np.array(curve.values, dtype=float)
    is_finite = np.isfinite(values)
    lost = steps[~is_finite]
    axes.plot(lost, np.full(len(lost), 0.97), "x", color=colour, markersize=5, transform=axes.get_xaxis_transform())
    steps, values = steps[is_finite], values[is_finite]
    if len(np.unique(steps)) < len(steps):
        alpha = min(0.8, 0.1 + 100 / len(values))
        axes.plot(steps, values, "o", color=colour, alpha=alpha, markersize=2.5, markeredgewidth=0, label=label)
    elif len(values) >= _MIN_POINTS_SMOOTHED:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
        axes.plot(*_smooth(steps, values), color=colour, linewidth=1.8, label=label)
    else:
        axes.plot(steps, values, "o-", color=colour, linewidth=1.4, markersize=3.5, label=label)


def _smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the middle half (by size) of the values around each of at most 400 places: no outlier moves them."""
    centres = np.unique(np.linspace(0, len(values) - 1, _MAX_POINTS_SMOOTHED).astype(int))
    half_width = max(4, len(values) // 40)
    windows = (np.sort(values[max(0, centre - half_width) : centre + half_width + 1]) for centre in centres)
    return steps[centres], np.array([w[len(w) // 4 : len(w) - len(w) // 4].mean() for w in windows])


def _may_span_decades(name: str) -> bool:
    return "loss" in name or "grad" in name or name.endswith("_s")


def _spans_decades(lines: dict[str, _Curve]) -> bool:
    values = np.concatenate([curve.values for curve in lines.values()])
    values = values[np.isfinite(values)]
    return len(values) > 0 and values.min() > 0 and values.max() > 10 * values.min()


def _heading(name: str) -> str:
    """`memory/peak_gb` -> "memory: peak (GB)"."""
    suffix, unit = next(((suffix, unit) for suffix, unit in _UNITS.items() if name.endswith(suffix)), ("", ""))
    words = name.removesuffix(suffix).replace("/", ": ").replace("_", " ")
    return f"{words} ({unit})" if unit else words
