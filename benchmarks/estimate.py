"""Constants of :mod:`llvlit.study.estimate`, fitted to the seconds that the cells of a finished study took.

    python benchmarks/estimate.py --data-dir FOLDER

Least squares of relative errors, seconds = CELL_SECONDS + operations / (EFFICIENCY * rate), over the cells of the
grid ``real`` that are not cut short, in ``results/seconds.csv``: two workers of one thread each on two processor cores.
The rate is that of one thread, measured here while another process multiplies, too, as the second worker did: run it
on the machine that the study ran on.
"""

from __future__ import annotations

import argparse
import multiprocessing

import numpy as np
import torch

from llvlit.study.cells import load_subject
from llvlit.study.estimate import count_operations, model_shape, product_rate, tokens_of
from llvlit.study.grid import load_grid
from llvlit.study.tables import committed, read_table


def rate_beside_another() -> float:
    """Operations a second of one thread beside a second process."""
    torch.set_num_threads(1)
    return float(np.median([product_rate(torch.device("cpu")) for _ in range(100)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder of the task files of the study")
    parser.add_argument("--rate", type=float, help="GFLOP/s of one thread, in place of a measurement")
    options = parser.parse_args()
    grid = load_grid("real")
    table = read_table(committed("real").parent, "seconds").set_index(["model", "task", "seed"])["seconds"]
    shapes = {name: model_shape(load_subject(name, device="cpu")) for name in grid.models}
    tokens, operations, seconds = {}, [], []
    for cell in grid.cells(data_dir=options.data_dir):
        if (key := (cell.model, cell.task, cell.seed)) in table.index:
            if cell.task not in tokens:
                tokens[cell.task] = tokens_of(cell)
            operations.append(count_operations(cell, shapes[cell.model], tokens[cell.task]))
            seconds.append(table[key])
    took, counted = np.array(seconds), np.array(operations)
    columns = np.stack([np.ones_like(counted), counted], axis=1) / took[:, None]
    (fixed, slope), *_ = np.linalg.lstsq(columns, np.ones_like(took), rcond=None)
    if options.rate is None:
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            rate = np.mean([one.get() for one in [pool.apply_async(rate_beside_another) for _ in range(2)]])
    else:
        rate = 1e9 * options.rate
    error = np.abs((fixed + slope * counted) / took - 1)
    print(f"{len(took)} cells, {took.sum() / 60:.0f} minutes; {rate / 1e9:.0f} GFLOP/s of one thread")
    print(f"CELL_SECONDS = {fixed:.1f}, EFFICIENCY = {1 / slope / rate:.2f}")
    print(f"relative error: mean {error.mean():.2f}, largest {error.max():.2f}")


if __name__ == "__main__":
    main()
