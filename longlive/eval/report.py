"""Results of the Shapes suite side by side: tables in Markdown, and a picture."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive.errors import InputError
from longlive.eval.figures import BODY_COUNTS
from longlive.weights.files import atomic_file, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LEVEL_LABELS = 6  # below bars side by side

Results = Mapping[str, Mapping[str, Any]]
"""What `evaluate` wrote, by the name it is to be shown under."""

_ATTRIBUTES = ("attributes", "all", *BODY_COUNTS, "count", "background", "colour", "shape", "size", "motion", "clean")
_BAND = ("mean", "low", "high")
_COLOURS = (
    *("#2f6db5", "#e07b28", "#3a9a6d", "#8a5fb0", "#c94a53"),
    *("#4aa5b8", "#b39023", "#7a7a7a", "#2b3a67", "#a3c14a"),
)


def compare(named: Sequence[str], folder: Path) -> tuple[Path, Path]:
    """Write `shapes.md` and `shapes.png` to the folder and return their paths. named: texts `name=file.json`.

    Raises InputError for a file that is no result of the suite and for a folder that cannot be written.
    """
    results = {}
    for text in named:
        name, separator, file = text.partition("=")
        if not (name and separator and file):
            raise InputError(f"--compare {text}: results are named, for example base=base.json")
        if name in results:
            raise InputError(f"--compare {text}: two results are called {name}")
        results[name] = read_json(Path(file))
        if results[name].get("suite") != "shapes":
            raise InputError(f"{file}: holds no results of evaluate --suite shapes")
    tables, picture = folder / "shapes.md", folder / "shapes.png"
    with atomic_file(tables) as written:
        written.write(markdown_table(results).encode() + b"\n")
    plot(results, picture)
    return tables, picture


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown_table(results: Results) -> str:
    """Tables of all that the results hold: accuracy, drift, switches. In brackets 95 % intervals."""
    tables = [_accuracy_table(results), _drift_table(results), _switch_table(results)]
    return "\n\n".join(table for table in tables if table)


def _accuracy_table(results: Results) -> str:
    rows = []
    for run, result in results.items():
        clips = {part: result[part] for part in ("world", "vae", "teacher") if part in result}
        clips |= {f"{time} s": figures for time, figures in result.get("length", {}).items()}
        rows += [
            [run, clip, str(figures["all"]["num"]), *(_percent(figures.get(name)) for name in _ATTRIBUTES)]
            for clip, figures in clips.items()
        ]
    return _table(["% right", "at", "videos", *_ATTRIBUTES], rows)


def _drift_table(results: Results) -> str:
    rows = [
        [run, f"{time} s", *_drift_cells(figures), _number(figures["background"])]
        for run, result in results.items()
        for time, figures in result.get("drift", {}).items()
    ]
    heads = ["drift", "at", "place, px", "median", "95 %", "tint", "marker kept, %", "background, levels"]
    return _table(heads, rows)


def _switch_table(results: Results) -> str:
    rows = []
    for run, result in results.items():
        for cache, figures in result.get("switch", {}).items():
            early, late, continuity = figures["0-2 s"], figures["2-4 s"], figures["continuity"]
            rows.append(
                [
                    *(run, cache),
                    *(_percent(window[name]) for window in (early, late) for name in ("attributes", "all")),
                    *(_percent(late[name]) for name in ("changed", "unchanged")),
                    *(_number(continuity["jump_px"]), _plain(continuity["jump_px"]["median"])),
                    *(_percent(continuity[name]) for name in ("small_jump", "lost")),
                    _number(figures["drift"]["place_px"]),
                ]
            )
    heads = ["switch", "cache", "0–2 s attributes", "all", "2–4 s attributes", "all", "changed", "unchanged"]
    return _table([*heads, "jump, px", "median", "≤ 8 px, %", "lost, %", "place drift, px"], rows)


def _drift_cells(figures: Mapping[str, Any]) -> list[str]:
    place = figures["place_px"]
    return [
        *(_number(place), _plain(place["median"]), _plain(place["p95"])),
        *(_number(figures["tint"]), _percent(figures["marker_kept"])),
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _percent(figure: Mapping[str, Any] | None) -> str:
    if figure is None:  # results of an older version
        return "–"
    return _with_interval(figure, 100, 1)


def _number(figure: Mapping[str, Any]) -> str:
    return _with_interval(figure, 1, 2)


def _with_interval(figure: Mapping[str, Any], factor: int, digits: int) -> str:
    mean, low, high = (_plain(figure[name], factor, digits) for name in ("mean", "low", "high"))
    return mean if figure["low"] is None else f"{mean} ({low}–{high})"


def _plain(value: float | None, factor: int = 1, digits: int = 2) -> str:
    return "–" if value is None else f"{factor * value:.{digits}f}"


# --- the picture ------------------------------------------------------------------------------------------------------


def plot(results: Results, path: Path) -> None:
    """Draw accuracy and drift over the length of the video, and switches, one colour for each result.

    path ends in .png, .pdf or .svg. Raises InputError where it cannot be written or there is nothing to draw.
    """
    # Not pyplot: a Figure alone draws without a display and leaves no global state. Imported late, since it is slow.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = {run: _COLOURS[i % len(_COLOURS)] for i, run in enumerate(results)}
    lengths = {run: result["length"] for run, result in results.items() if "length" in result}
    switches = {
        f"{run}\n{cache}": (colours[run], figures)
        for run, result in results.items()
        for cache, figures in result.get("switch", {}).items()
    }
    drifts = {run: result["drift"] for run, result in results.items() if result.get("drift")}
    num_rows = bool(lengths or drifts) + bool(switches)
    if num_rows == 0:
        raise InputError(f"{path}: the results hold neither lengths nor switches to draw")
    figure = Figure(figsize=(14, 0.5 + 3.2 * num_rows), dpi=120, layout="constrained")
    grid = figure.subplots(num_rows, 3, squeeze=False)
    if lengths or drifts:
        _draw_lines(grid[0, 0], "attributes right, %", _curves(lengths, "attributes", 100), colours)
        _draw_lines(grid[0, 1], "all right at once, %", _curves(lengths, "all", 100), colours)
        _draw_lines(grid[0, 2], "drift of the unnamed place, px", _curves(drifts, "place_px", 1), colours)
    if switches:
        _draw_bars(grid[-1, 0], "attributes right 0–2 s after a switch, %", switches, ("0-2 s", "attributes"), 100)
        _draw_bars(grid[-1, 1], "attributes right 2–4 s after a switch, %", switches, ("2-4 s", "attributes"), 100)
        _draw_bars(grid[-1, 2], "jump at a switch, px", switches, ("continuity", "jump_px"), 1)
    if len(results) > 1:
        handles = [Patch(color=colours[run], label=run) for run in results]
        figure.legend(handles=handles, loc="outside upper center", ncols=8, edgecolor="none")
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:])


_Curve = list[tuple[float, float, float, float]]
"""Points: seconds, mean, low, high."""


def _curves(runs: Results, name: str, factor: int) -> dict[str, _Curve]:
    return {
        run: [
            (float(time), *(factor * (figure["mean"] if figure[key] is None else figure[key]) for key in _BAND))
            for time, figures in over_time.items()
            if (figure := figures[name])["mean"] is not None
        ]
        for run, over_time in runs.items()
    }


def _draw_lines(axes: "Axes", title: str, curves: Mapping[str, _Curve], colours: Mapping[str, str]) -> None:
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    for run, points in curves.items():
        times, means, lows, highs = zip(*points, strict=True) if points else ((), (), (), ())
        axes.fill_between(times, lows, highs, color=colours[run], alpha=0.15, linewidth=0)
        axes.plot(times, means, "o-", color=colours[run], linewidth=1.5, markersize=3.5, label=run)
    axes.set_xscale("log")
    axes.set_xticks(sorted({time for points in curves.values() for time, *_ in points}))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("seconds of video", fontsize=9)
    _dress(axes, title)


def _draw_bars(
    axes: "Axes", title: str, bars: Mapping[str, tuple[str, Mapping[str, Any]]], keys: tuple[str, str], factor: int
) -> None:
    """A bar of the mean with its interval for every label, which has a colour and figures."""
    section, name = keys
    for place, (colour, figures) in enumerate(bars.values()):
        mean, low, high = (figures[section][name][key] for key in _BAND)
        if mean is None:
            continue
        axes.bar(place, factor * mean, color=colour, width=0.7)
        if low is not None:
            axes.errorbar(place, factor * mean, [[factor * (mean - low)], [factor * (high - mean)]], color="#444444")
    caches = [label.rpartition("\n")[2] for label in bars]  # colours tell whose
    axes.set_xticks(range(len(bars)), labels=caches, rotation=90 if len(bars) > _MOST_LEVEL_LABELS else 0)
    if factor == 100:
        axes.set_ylim(*_percent_range(figures[section][name] for _, figures in bars.values()))
    _dress(axes, title)


def _percent_range(figures: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """From a round number under all intervals to 100."""
    lows = [figure["mean"] if figure["low"] is None else figure["low"] for figure in figures]
    lowest = min((low for low in lows if low is not None), default=0.0)
    return max(0.0, (10 * lowest // 1 - 0.5) * 10), 100.0


def _dress(axes: "Axes", title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8, length=0, which="both")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b0b0")
