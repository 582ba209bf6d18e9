"""What ``llvlit study`` does: run a grid, foretell its cost, or report its results."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llvlit.cli.options import add_data_dir, add_device, command, count, seed
from llvlit.cli.terminal import show
from llvlit.errors import CellError

if TYPE_CHECKING:
    import pandas as pd

    from llvlit.study.grid import Grid


def mount(commands: Any) -> None:
    """Add the command."""
    study = command(
        commands,
        "study",
        run,
        "A grid of models, tasks and seeds: agreement of every predictor, energy of every schedule. A killed run "
        "goes on where it stopped.",
        "llvlit study embedded --workers 2\n  llvlit study real --data-dir tasks --out real --workers 2\n"
        "  llvlit study paper --dry-run",
    )
    study.add_argument("grid", nargs="?", default="embedded", help="embedded (default), real, paper, or a .toml file")
    study.add_argument("--out", metavar="FOLDER", help="folder of the results (default study-GRID)")
    study.add_argument("--models", nargs="+", metavar="NAME", help="instead of the grid's; untrained:NAME is a control")
    study.add_argument("--tasks", nargs="+", metavar="NAME", help="instead of the grid's")
    study.add_argument("--seeds", type=seed, nargs="+", metavar="SEED", help="instead of the grid's")
    study.add_argument(
        "--prompts",
        type=count,
        metavar="N",
        help="N prompts per class to operate and N to evaluate, 2 N for directions",
    )
    study.add_argument("--workers", type=count, default=1, metavar="N", help="worker processes (default 1)")
    study.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a running Dask scheduler, such as tcp://host:8786; as trusted as its network, for whoever reaches it can "
        "run code on its workers and here",
    )
    study.add_argument("--dry-run", action="store_true", help="list every cell with its predicted cost, run nothing")
    study.add_argument("--report", action="store_true", help="run nothing; report what the folder holds")
    study.add_argument("--save", metavar="FOLDER", help="folder of CSV files and figures (default OUT/report)")
    add_data_dir(study)
    add_device(study)


def run(options: argparse.Namespace) -> None:
    """Run or resume a grid of experiments; or list its cells and their cost; or report what is there."""
    from llvlit.study.grid import change_axes, load_grid

    grid = load_grid(options.grid)
    grid = change_axes(grid, {key: getattr(options, key) for key in ("models", "tasks", "seeds")})
    if (n := options.prompts) is not None:
        suffixes = {task: {"suffix": own["suffix"]} for task, own in grid.per_task.items() if "suffix" in own}
        settings = replace(grid.settings, concept=2 * n, operating=n, evaluation=n)
        grid = replace(grid, settings=settings, per_task=suffixes)
    folder = Path(options.out or f"study-{grid.name}")
    if options.dry_run:
        _dry_run(grid, options)
        return
    lines = [] if options.report else [_compute(grid, folder, options)]
    summaries, told = _report(grid, folder, options)
    show(options, {name: rows.to_dict("records") for name, rows in summaries.items()}, "\n".join(lines + told))


def _compute(grid: Grid, folder: Path, options: argparse.Namespace) -> str:
    """Run the cells that are missing; say how many there were."""
    from llvlit.study.cells import run_study
    from llvlit.study.runner import failure_path

    outcome = run_study(
        grid,
        folder,
        data_dir=options.data_dir,
        device=options.device,
        workers=options.workers,
        scheduler=options.scheduler,
        own_process=True,
        progress=not options.json,
    )
    computed = f"{grid.name}: {len(outcome.done)} cells computed, {len(outcome.kept)} kept."
    if outcome.failed:
        lines = [f"  {key}: {reason} ({failure_path(folder, key)})" for key, reason in outcome.failed.items()]
        total = len(outcome.failed) + len(outcome.done) + len(outcome.kept)
        raise CellError(
            f"{len(outcome.failed)} of {total} cells failed; the others are in {folder}, and the same command tries "
            "again.\n" + "\n".join(lines)
        )
    return computed


def _dry_run(grid: Grid, options: argparse.Namespace) -> None:
    """List every cell with its predicted cost."""
    from llvlit.engine.models import torch_device
    from llvlit.study.cells import check_names, load_subject
    from llvlit.study.estimate import PAPER_SHAPES, estimate, model_shape, product_rate

    cells = grid.cells(data_dir=options.data_dir)
    check_names(cells)
    device = torch_device(options.device)
    rate = product_rate(device)
    shapes = {  # those of the paper need no hub
        name: PAPER_SHAPES.get(name) or model_shape(load_subject(name, device="cpu")) for name in grid.models
    }
    costs = {cell.key: estimate(cell, shapes[cell.model], rate, device=device) for cell in cells}
    rows: list[dict[str, Any]] = [
        {"cell": key, "tflop": cost.operations / 1e12, "gigabytes": cost.memory / 1e9, "minutes": cost.minutes}
        for key, cost in costs.items()
    ]
    lines = [f"{'cell':<60} {'TFLOP':>9} {'memory, GB':>11} {'minutes':>8}"]
    lines += ["{cell:<60} {tflop:>9.2f} {gigabytes:>11.2f} {minutes:>8.1f}".format(**row) for row in rows]
    total = sum(cost.minutes for cost in costs.values())
    lines += [
        f"\n{len(rows)} cells, {total:.0f} minutes one after the other on {device}, give or take a factor of two;",
        "less where a model does not show its concept. Counted operations, see llvlit.study.estimate;",
        f"{rate / 1e9:.0f} GFLOP/s in float32 matrix products now, with as many threads as a single worker has.",
    ]
    show(options, rows, "\n".join(lines))


def _report(grid: Grid, folder: Path, options: argparse.Namespace) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Write tables and figures; return the summaries, and the lines that tell them."""
    from llvlit.study.cells import claim_folder, load_results
    from llvlit.study.tables import (
        plain_rows,
        rows_at,
        summarize,
        summarize_energies,
        tables,
        told_of_cells,
        write_tables,
    )

    claim_folder(grid, folder)
    results = load_results(folder, [cell.key for cell in grid.cells()])
    lines = []
    for missing in results.not_visible:
        cell = missing["cell"]
        lines.append(f"Left out: {cell['model']} does not show {cell['task']} (seed {cell['seed']}).")
    if not results.finished:
        told = "No model shows its concept at the last token. Use more prompts, other tasks, or a suffix."
        raise CellError("\n".join([told, *lines]))
    n_missing = len(grid.cells()) - len(results.finished) - len(results.not_visible)
    if n_missing:
        lines.append(f"{n_missing} of {len(grid.cells())} cells are not there yet.")
    frames = tables(results)
    settings = grid.settings
    rows = rows_at(
        plain_rows(frames["agreement"], settings.directions[0]),
        order=settings.orders[-1],
        amplitude=settings.amplitudes[0],
    )
    lines += told_of_cells(frames["cells"])
    labels = {"spearman": "Spearman", "pearson": "Pearson", "relative_error": "rel. error"}
    varied = [name for name in ("jacobian", "final_norm") if rows[name].nunique() > 1]
    by = ["model", *varied, "predictor", "layers"]
    found = {"agreement": summarize(rows, by, list(labels))}
    intervals = "95 % intervals over tasks, seeds and prompts"
    lines.append(f"Agreement with measured gains at order {rows['order'].max():g}, means with {intervals}\n")
    lines += _lines(found["agreement"], by, labels)
    if len(frames["energy"]):
        by = ["model", *varied, "metric", "layers", "schedule"]
        found["energy"] = summary = summarize_energies(frames["energy"], by)
        lines.append(f"\nEnergy in units of the first surrogate's optimum, geometric means with {intervals}")
        lines += ["no ratio: cells left out of the mean, since the schedule or that optimum is out of reach there"]
        lines += ["out of reach: searches that found no energy (one a prompt; random layer: one a prompt and layer)\n"]
        censored = [f"{one.n_censored} of {one.n_rows}" for one in summary.itertuples()]
        told = summary.assign(**{"no ratio": censored, "out of reach": summary["n_out_of_reach"]})
        lines += _lines(told, [*by, "no ratio", "out of reach"], {"ratio": "energy / optimum"})
    out = Path(options.save or folder / "report")
    paths = write_tables(results, grid, out)
    paths += _figures(found, out)
    lines.append("\nWritten: " + ", ".join(str(path) for path in paths))
    return found, lines


def _lines(summary: pd.DataFrame, keys: Sequence[str], values: dict[str, str]) -> list[str]:
    """Head and rows of a printed table: keys, then values with their intervals."""
    widths = [max(len(key), *(len(str(value)) for value in summary[key])) for key in keys]
    head = "  ".join(f"{key:<{width}}" for key, width in zip(keys, widths, strict=True))
    lines = [head + "".join(f"{label:>28}" for label in values.values())]
    for _, row in summary.iterrows():
        line = "  ".join(f"{row[key]!s:<{width}}" for key, width in zip(keys, widths, strict=True))
        lines.append(line + "".join(f"{_interval(row, value):>28}" for value in values))
    return lines


def _interval(row: pd.Series, value: str) -> str:
    """A mean with its interval; a dash for what there is none of."""
    middle, low, high = (
        "-" if math.isnan(number := row[name]) else f"{number:.3f}" for name in (value, f"{value}_low", f"{value}_high")
    )
    return middle if middle == "-" else f"{middle} -" if "-" in (low, high) else f"{middle} [{low}, {high}]"


def _figures(found: dict[str, pd.DataFrame], out: Path) -> list[Path]:
    """Figures of the report, as PNG."""
    from llvlit.plots import figures
    from llvlit.plots import study as study_figures

    paths = []
    for name, summary in found.items():
        for axis, word in (("jacobian", "{}"), ("final_norm", "norm: {}")):
            if axis in summary:  # a kind of its own, beside the model's name
                summary = summary.assign(model=summary["model"] + "\n" + summary[axis].map(word.format))
        figure = (
            study_figures.agreement_summary(summary) if name == "agreement" else study_figures.energy_summary(summary)
        )
        paths.append(figures.save(figure, out / f"{name}.png"))
    return paths
