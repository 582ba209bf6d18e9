"""Limits on inputs: the cheapest push within them, exactly; where there is none, which limit stands in the way."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llvlit.checks import array, choice, integer, refuse
from llvlit.errors import InputError

SIGNS = {"+": 1.0, "-": -1.0}
CLOSE = 1e-12
"""Relative gap of energies at which the search for layers ends."""


@dataclass(frozen=True)
class Limits:
    """What inputs ``(n_layers,)`` may be; None: anything.  See :func:`llvlit.minimum_energy`."""

    limit: np.ndarray | None = None
    sign: str | None = None
    layers: tuple[int, int] | None = None
    most_layers: int | None = None

    def names(self) -> list[str]:
        """Of those that are set."""
        return [name for name, value in vars(self).items() if value is not None]

    def reach(self, h: np.ndarray, towards: float) -> np.ndarray:
        """How far each layer alone may move the output in one direction, ``(n_layers,)``; infinite without a limit."""
        most = np.full(len(h), np.inf) if self.limit is None else self.limit
        may = h != 0
        if self.layers is not None:
            first, last = self.layers
            may &= (np.arange(len(h)) >= first) & (np.arange(len(h)) <= last)
        if self.sign is not None:
            may &= np.sign(h) * towards == SIGNS[self.sign]
        return np.where(may, np.abs(h), 0.0) * np.where(may, most, 0.0)

    def most(self, h: np.ndarray, towards: float) -> float:
        """How far all inputs that are allowed may move the output in one direction."""
        return float(np.sort(self.reach(h, towards))[::-1][: self.most_layers].sum())


def checked_limits(
    n_layers: int,
    limit: float | np.ndarray | None,
    sign: str | None,
    layers: tuple[int, int] | None,
    most_layers: int | None,
) -> Limits:
    """Limits from the arguments of :func:`llvlit.minimum_energy`, which names them in its errors."""
    if limit is not None:
        values = array("limit", limit, finite=False)
        if values.shape not in ((), (n_layers,)):
            raise InputError(f"limit has shape {values.shape}; expected a number, or one for each of {n_layers} gains.")
        if not (values >= 0).all():
            raise InputError("limit holds a number that is not 0 or more; pass the largest size of each input.")
        limit = np.broadcast_to(values, (n_layers,))
    if sign is not None:
        choice("sign", sign, SIGNS)
    if layers is not None:
        if not isinstance(layers, list | tuple) or len(layers) != 2:
            raise refuse("layers", layers, "the first and the last layer, such as (4, 9)")
        first, last = (integer("layers", layer, at_least=0, at_most=n_layers - 1) for layer in layers)
        if first > last:
            raise InputError(f"layers=({first}, {last}) ends before it begins. Pass the first layer first.")
        layers = first, last
    if most_layers is not None:
        most_layers = integer("most_layers", most_layers, at_least=1)
    return Limits(limit, sign, layers, most_layers)


def cheapest_within(h: np.ndarray, weights: np.ndarray, target: float, limits: Limits) -> np.ndarray:
    """Inputs of least energy ``u^T W u`` within limits that move the output by the target; the gains are not all zero.

    No optimum pushes against its target: such an input set to zero, and the others scaled down until the target is
    met again, would be cheaper.  So the shares ``z_l = |h_l u_l|`` of the shift solve

        min sum z_l^2 / s_l,  sum z_l = |target|,  0 <= z_l <= r_l,  at most m of them not zero,

    with the worth ``s_l = h_l^2 / W_l`` and the reach ``r_l = |h_l| limit_l``.
    """
    towards = np.sign(target) or 1.0
    reach, most = limits.reach(h, towards), limits.most(h, towards)
    if abs(target) > most * (1 + CLOSE):
        raise InputError(_out_of_reach(h, target, limits, most))
    root_of_worth = np.abs(h) / np.abs(h).max() / np.sqrt(weights)
    worth = (root_of_worth / root_of_worth.max()) ** 2
    usable = np.flatnonzero((reach > 0) & (worth > 0))
    shares = np.zeros(len(h))
    if target and len(usable):
        picked = cheapest_shares(worth[usable], reach[usable] / abs(target), limits.most_layers or len(h))
        shares[usable] = abs(target) * picked
    inputs = np.divide(towards * shares, h, out=np.zeros(len(h)), where=shares > 0)
    return inputs if limits.limit is None else np.clip(inputs, -limits.limit, limits.limit)


def _out_of_reach(h: np.ndarray, target: float, limits: Limits, most: float) -> str:
    without = []
    for name in limits.names():
        further = replace(limits, **{name: None}).most(h, np.sign(target))
        if further > most:
            without.append(f"without {name} {'any' if further == np.inf else f'{further:.6g}'}")
    return (
        f"target={target:g} is out of reach: inputs within {', '.join(limits.names())} move the output by at most "
        f"{most:.6g} that way, {', '.join(without) or 'and no more without any one of them'}. Lower the target, or "
        "loosen a limit."
    )


def cheapest_shares(worth: np.ndarray, reach: np.ndarray, most_layers: int) -> np.ndarray:
    """Shares z >= 0 of least ``sum z^2 / worth``, with ``sum z = 1``, ``z <= reach``, at most so many not zero.

    Branch and bound over the layers.  For any multiplier, ``2 mu - sum of the m largest of z_l (2 mu - z_l / s_l)`` at
    ``z_l = min(mu s_l, r_l)`` is no more than the least energy (Lagrange); where the m layers are the same on both
    sides of the best multiplier, it is the least energy, and else the two sets say which layer to decide next.  Where
    worth and reach put the layers into one order, as without weights and with one limit for all, the m largest gains
    are the same at every multiplier: the first bound is exact and sorting is enough.

    Examples
    --------
    >>> from llvlit.method.limits import cheapest_shares
    >>> cheapest_shares(np.array([9.0, 4.0, 1.0]), np.array([0.3, 2.0, 2.0]), 2)
    array([0.3, 0.7, 0. ])
    """
    best, least = np.zeros(len(worth)), np.inf
    open_nodes = [(np.zeros(len(worth), dtype=bool), np.ones(len(worth), dtype=bool))]  # decided for, undecided
    while open_nodes:
        taken, free = open_nodes.pop()
        n_free = min(most_layers - int(taken.sum()), int(free.sum()))
        if reach[taken].sum() + np.sort(reach[free])[::-1][:n_free].sum() < 1 - CLOSE:
            continue
        bound, below, above = _bound(worth, reach, taken, free, n_free)
        if bound >= least * (1 - CLOSE):
            continue
        shares = np.zeros(len(worth))
        shares[above] = _filled(worth[above], reach[above])
        energy = (shares**2 / worth).sum()
        if energy < least:
            best, least = shares, energy
        disputed = np.setxor1d(below, above)
        if not len(disputed) or bound >= least * (1 - CLOSE):
            continue
        layer = np.zeros(len(worth), dtype=bool)
        layer[disputed[np.argmax(worth[disputed])]] = True
        open_nodes.append((taken, free & ~layer))
        if n_free:
            open_nodes.append((taken | layer, free & ~layer))
    return best


def _bound(
    worth: np.ndarray, reach: np.ndarray, taken: np.ndarray, free: np.ndarray, n_free: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Least energy at most, and the layers picked just below and just above the best multiplier."""
    sure, open_ = np.flatnonzero(taken), np.flatnonzero(free)

    def at(multiplier: float) -> tuple[float, float, np.ndarray]:
        shares = np.minimum(multiplier * worth, reach)
        worthwhile = shares * (2 * multiplier - shares / worth)
        picked = np.concatenate([sure, open_[np.argsort(-worthwhile[open_], kind="stable")[:n_free]]])
        return 2 * multiplier - worthwhile[picked].sum(), shares[picked].sum(), picked

    low, high = 0.0, 1 / worth.sum()
    while (found := at(high))[1] < 1 and high < 1e100:
        low, high = high, 2 * high
    if found[1] < 1:  # reached in the limit alone: all go to their limits
        widest = open_[np.argsort(-reach[open_], kind="stable")[:n_free]]
        picked = np.concatenate([sure, widest])
        return (reach[picked] ** 2 / worth[picked]).sum(), picked, picked
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if at(middle)[1] < 1 else (low, middle)
    return max(at(low)[0], at(high)[0]), at(low)[2], at(high)[2]


def _filled(worth: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """``min(mu worth, reach)`` with sum 1: those of least reach for their worth are at their limit."""
    order = np.argsort(reach / worth)
    before = np.concatenate([[0.0], reach[order].cumsum()[:-1]])
    multipliers = (1 - before) / worth[order][::-1].cumsum()[::-1]
    inside = multipliers * worth[order] <= reach[order]
    return np.minimum(multipliers[inside.argmax()] * worth, reach) if inside.any() else reach
