"""What ``llvlit study`` does: run a grid, foretell its cost, or report its results."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llvlit.commands import say
from llvlit.errors import CellError, InputError

if TYPE_CHECKING:
    import pandas as pd

    from llvlit.grid import Grid


def study(options: argparse.Namespace) -> Any:
    """Run or resume a grid of experiments; or list its cells and their cost; or report what is there."""
    from llvlit.grid import change_axes, load_grid

    grid = load_grid(options.grid)
    grid = change_axes(grid, {key: getattr(options, key) for key in ("models", "tasks", "seeds")})
    if (n := options.prompts) is not None:
        if n < 1:
            raise InputError(f"prompts={n} must be at least 1 prompt per class.")
        suffixes = {task: {"suffix": own["suffix"]} for task, own in grid.per_task.items() if "suffix" in own}
        settings = replace(grid.settings, concept=2 * n, operating=n, evaluation=n)
        grid = replace(grid, settings=settings, per_task=suffixes)
    folder = Path(options.out or f"study-{grid.name}")
    if options.dry_run:
        return _dry_run(grid, options)
    if not options.report:
        _run(grid, folder, options)
    return _report(grid, folder, options)


def _run(grid: Grid, folder: Path, options: argparse.Namespace) -> None:
    from llvlit.runner import failure_path
    from llvlit.study import run_study

    outcome = run_study(
        grid,
        folder,
        data_dir=options.data_dir,
        device=options.device,
        workers=options.workers,
        scheduler=options.scheduler,
        progress=not options.json,
    )
    say(options, f"{grid.name}: {len(outcome.done)} cells computed, {len(outcome.kept)} kept.")
    if outcome.failed:
        lines = [f"  {key}: {reason} ({failure_path(folder, key)})" for key, reason in outcome.failed.items()]
        total = len(outcome.failed) + len(outcome.done) + len(outcome.kept)
        raise CellError(
            f"{len(outcome.failed)} of {total} cells failed; the others are in {folder}, and the same command tries "
            "again.\n" + "\n".join(lines)
        )


def _dry_run(grid: Grid, options: argparse.Namespace) -> list[dict[str, Any]]:
    from llvlit.estimate import PAPER_SHAPES, estimate, model_shape, product_rate
    from llvlit.models import torch_device
    from llvlit.study import load_subject

    device = torch_device(options.device)
    rate = product_rate(device)
    rows = []
    shapes = {  # those of the paper need no hub
        name: PAPER_SHAPES.get(name) or model_shape(load_subject(name, device="cpu")) for name in grid.models
    }
    say(options, f"{'cell':<60} {'TFLOP':>9} {'memory, GB':>11} {'minutes':>8}")
    for cell in grid.cells(data_dir=options.data_dir):
        found = estimate(cell, shapes[cell.model], rate, device=device)
        row: dict[str, Any] = {"cell": cell.key, "tflop": found.operations / 1e12, "gigabytes": found.memory / 1e9}
        row["minutes"] = found.minutes
        say(options, "{cell:<60} {tflop:>9.2f} {gigabytes:>11.2f} {minutes:>8.1f}".format(**row))
        rows.append(row)
    total = sum(row["minutes"] for row in rows)
    say(options, f"\n{len(rows)} cells, {total:.0f} minutes one after the other on {device}")
    say(options, f"({rate / 1e9:.0f} GFLOP/s in float32 matrix products; counted operations, see llvlit.estimate).")
    return rows


def _report(grid: Grid, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from llvlit.report import summarize, tables, write_tables
    from llvlit.study import claim_folder, load_results

    claim_folder(grid, folder)
    results = load_results(folder, [cell.key for cell in grid.cells()])
    for missing in results.not_visible:
        cell = missing["cell"]
        say(options, f"Left out: {cell['model']} does not show {cell['task']} (seed {cell['seed']}).")
    if not results.experiments:
        raise CellError("No model shows its concept at the last token. Use more prompts, other tasks, or a suffix.")
    n_missing = len(grid.cells()) - len(results.experiments) - len(results.not_visible)
    if n_missing:
        say(options, f"{n_missing} of {len(grid.cells())} cells are not there yet.")
    frames = tables(results)
    frame = frames["agreement"]
    order = frame["order"].max()
    frame = frame[~frame["predictor"].str.contains(", ")]
    largest = frame[
        (frame["order"].isna() | (frame["order"] == frame.groupby("model")["order"].transform("max")))
        & (frame["amplitude"] == frame["amplitude"].iloc[0])
        & (frame["direction"] == frame["direction"].iloc[0])
        & (frame["n_operating"] == frame.groupby(["model", "task"])["n_operating"].transform("max"))
    ]
    labels = {"spearman": "Spearman", "pearson": "Pearson", "relative_error": "rel. error"}
    varied = [name for name in ("jacobian", "final_norm") if frame[name].nunique() > 1]
    found = {"agreement": summarize(largest, ["model", *varied, "predictor", "layers"], list(labels))}
    say(options, f"Agreement with measured gains at order {order:g}, means over tasks and seeds with 95 % intervals\n")
    _print(options, found["agreement"], labels)
    if len(frames["energy"]):
        found["energy"] = summarize(
            frames["energy"], ["model", *varied, "metric", "layers", "schedule"], ["ratio"], log=True
        )
        say(options, "\nEnergy in units of the first surrogate's optimum, geometric means\n")
        _print(options, found["energy"], {"ratio": "energy / optimum"})
    out = Path(options.save or folder / "report")
    paths = write_tables(results, grid, out)
    paths += _figures(found, out)
    say(options, "\nWritten: " + ", ".join(str(path) for path in paths))
    return {name: rows.to_dict("records") for name, rows in found.items()}


def _print(options: argparse.Namespace, summary: pd.DataFrame, values: dict[str, str]) -> None:
    keys = [name for name in summary.columns if summary[name].dtype == object or str(summary[name].dtype) == "str"]
    widths = [max(len(key), *(len(str(value)) for value in summary[key])) for key in keys]
    head = "  ".join(f"{key:<{width}}" for key, width in zip(keys, widths, strict=True))
    say(options, head + "".join(f"{label:>28}" for label in values.values()))
    for _, row in summary.iterrows():
        line = "  ".join(f"{row[key]!s:<{width}}" for key, width in zip(keys, widths, strict=True))
        cells = (f"{row[v]:.3f} [{row[f'{v}_low']:.3f}, {row[f'{v}_high']:.3f}]" for v in values)
        say(options, line + "".join(f"{cell:>28}" for cell in cells))


def _figures(found: dict[str, pd.DataFrame], out: Path) -> list[Path]:
    """Figures of the report, as PNG."""
    from llvlit import figures

    paths = []
    for name, summary in found.items():
        for axis, word in (("jacobian", "{}"), ("final_norm", "norm: {}")):
            if axis in summary:  # a kind of its own, beside the model's name
                summary = summary.assign(model=summary["model"] + "\n" + summary[axis].map(word.format))
        figure = figures.agreement_summary(summary) if name == "agreement" else figures.energy_summary(summary)
        paths.append(figures.save(figure, out / f"{name}.png"))
    return paths
