"""What ``llvlit study`` does: run a grid, foretell its cost, or report its results."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llvlit.cli.options import add_data_dir, add_device, command
from llvlit.cli.terminal import columns, show
from llvlit.errors import CellError

if TYPE_CHECKING:
    import pandas as pd

    from llvlit.study.grid import Grid

AGREEMENT = {"spearman": "Spearman", "pearson": "Pearson", "relative_error": "rel. error"}
INTERVALS = "95 % intervals over tasks, seeds and prompts"


def mount(commands: Any) -> None:
    """Add the command."""
    examples = ("embedded --workers 2", "real --data-dir tasks --out real --workers 2", "paper --dry-run")
    parser = command(commands, study, "\n  ".join(f"llvlit study {example}" for example in examples))
    parser.add_argument("grid", nargs="?", default="embedded", help="embedded (default), real, paper, or a .toml file")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the results (default study-GRID)")
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="instead of the grid's; untrained:NAME is a control"
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="instead of the grid's")
    parser.add_argument("--seeds", type="seed", nargs="+", metavar="SEED", help="instead of the grid's")
    told = "N prompts per class to operate and N to evaluate, 2 N for directions"
    parser.add_argument("--prompts", type="count", metavar="N", help=told)
    parser.add_argument("--workers", type="count", default=1, metavar="N", help="worker processes (default 1)")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a running Dask scheduler, such as tcp://host:8786; as trusted as its network, for whoever reaches it can "
        "run code on its workers and here",
    )
    parser.add_argument("--dry-run", action="store_true", help="list every cell with its predicted cost, run nothing")
    parser.add_argument("--report", action="store_true", help="run nothing; report what the folder holds")
    parser.add_argument("--save", metavar="FOLDER", help="folder of CSV files and figures (default OUT/report)")
    add_data_dir(parser)
    add_device(parser)


def study(options: argparse.Namespace) -> None:
    """A grid of models, tasks and seeds: agreement of every predictor, energy of every schedule. A killed run
    goes on where it stopped.
    """
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
    n_done, n_kept, n_failed = len(outcome.done), len(outcome.kept), len(outcome.failed)
    if n_failed:
        head = f"{n_failed} of {n_failed + n_done + n_kept} cells failed; the others are in {folder}, and the same "
        lines = [f"  {key}: {reason} ({failure_path(folder, key)})" for key, reason in outcome.failed.items()]
        raise CellError("\n".join([f"{head}command tries again.", *lines]))
    return f"{grid.name}: {n_done} cells computed, {n_kept} kept."


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
    rows: list[dict[str, Any]] = []
    for cell in cells:
        cost = estimate(cell, shapes[cell.model], rate, device=device)
        numbers = {"tflop": cost.operations / 1e12, "gigabytes": cost.memory / 1e9, "minutes": cost.minutes}
        rows.append({"cell": cell.key, **numbers})
    table = columns(rows, {"tflop": "{:>8.2f}", "gigabytes": "{:>9.2f}", "minutes": "{:>7.1f}"})
    total = sum(row["minutes"] for row in rows)
    told = (
        f"{len(rows)} cells, {total:.0f} minutes one after the other on {device}, give or take a factor of two;\n"
        "less where a model does not show its concept. Counted operations, see llvlit.study.estimate;\n"
        f"{rate / 1e9:.0f} GFLOP/s in float32 matrix products now, with as many threads as a single worker has."
    )
    show(options, rows, f"{table}\n\n{told}")


def _report(grid: Grid, folder: Path, options: argparse.Namespace) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Write tables and figures; return the summaries, and the lines that tell them."""
    from llvlit.plots import figures
    from llvlit.plots import study as study_figures
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
    keys = [cell.key for cell in grid.cells()]
    results = load_results(folder, keys)
    lines = [
        "Left out: {model} does not show {task} (seed {seed}).".format(**missing["cell"])
        for missing in results.not_visible
    ]
    if not results.finished:
        told = "No model shows its concept at the last token. Use more prompts, other tasks, or a suffix."
        raise CellError("\n".join([told, *lines]))
    if n_missing := len(keys) - len(results.finished) - len(results.not_visible):
        lines.append(f"{n_missing} of {len(keys)} cells are not there yet.")
    frames = tables(results)
    lines += told_of_cells(frames["cells"])

    order, amplitude = grid.settings.orders[-1], grid.settings.amplitudes[0]
    rows = rows_at(plain_rows(frames["agreement"], grid.settings.directions[0]), order=order, amplitude=amplitude)
    by = ["model", *(name for name in ("jacobian", "final_norm") if rows[name].nunique() > 1)]
    agreement = summarize(rows, [*by, "predictor", "layers"], [*AGREEMENT])
    summaries = {"agreement": agreement}
    lines += [f"Agreement with measured gains at order {rows['order'].max():g}, means with {INTERVALS}\n"]
    lines += [_table(agreement, AGREEMENT)]
    if len(frames["energy"]):
        summaries["energy"] = energy = summarize_energies(frames["energy"], [*by, "metric", "layers", "schedule"])
        censored = [f"{row.n_censored} of {row.n_rows}" for row in energy.itertuples()]
        told = energy.assign(**{"no ratio": censored, "out of reach": energy["n_out_of_reach"]})
        lines += [f"\nEnergy in units of the first surrogate's optimum, geometric means with {INTERVALS}"]
        lines += ["no ratio: cells left out of the mean, since the schedule or that optimum is out of reach there"]
        lines += ["out of reach: searches that found no energy (one a prompt; random layer: one a prompt and layer)\n"]
        lines += [_table(told, {"ratio": "energy / optimum"})]

    out = Path(options.save or folder / "report")
    paths = write_tables(results, grid, out)
    plots: dict[str, Any] = {"agreement": study_figures.agreement_summary, "energy": study_figures.energy_summary}
    for name, summary in summaries.items():
        for axis in by[1:]:  # a kind of its own, beside the model's name
            kinds = summary[axis].map({"final_norm": "norm: {}"}.get(axis, "{}").format)
            summary = summary.assign(model=summary["model"] + "\n" + kinds)
        paths.append(figures.save(plots[name](summary), out / f"{name}.png"))
    return summaries, [*lines, "\nWritten: " + ", ".join(map(str, paths))]


def _table(summary: pd.DataFrame, values: dict[str, str]) -> str:
    """A summary as it is printed: what its rows are about, then values with their intervals."""
    hidden = {name for name in summary if name in values or name.startswith("n_") or name.endswith(("_low", "_high"))}
    rows = []
    for row in summary.to_dict("records"):
        about = {str(name): value for name, value in row.items() if name not in hidden}
        numbers = {label: [row[name], row[f"{name}_low"], row[f"{name}_high"]] for name, label in values.items()}
        rows.append(about | {label: _interval(*number) for label, number in numbers.items()})
    return columns(rows)


def _interval(mean: float, low: float, high: float) -> str:
    """A mean with its interval; a dash for what there is none of."""
    if math.isnan(mean):
        return "-"
    return f"{mean:.3f} -" if math.isnan(low) or math.isnan(high) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
