"""Feedback: pushes that read the state on its way and correct, from a linear-quadratic regulator on a surrogate."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from llvlit.checks import array, instance, number
from llvlit.engine.depth import DepthSystem
from llvlit.engine.layer import real_tensor
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, origin, tokens_of
from llvlit.errors import InputError, NumericalError
from llvlit.method.concepts import DirectionsLike, as_directions, borrowed_of
from llvlit.method.gains import adjoints_of
from llvlit.method.hankel import gains_between
from llvlit.method.results import Result
from llvlit.method.surrogate import LLV
from llvlit.prompts import Prompts


@dataclass(frozen=True)
class FeedbackLaw:
    """Inputs that depend on the state: ``u_l = k_l - K_l r_l``.

    The state r_l is read off the deviation ``dx_l = x_l - xbar_l`` from the prompt's own run without inputs.  Where
    the surrogate has bases, ``r_l = Q_l^T dx_l``; where it has none (:func:`llvlit.realize`), a time-varying Kalman
    filter finds it from the output ``y_l = v_l^T dx_l`` alone:
    ``r_l = r + M_l (y_l - C_l r)``, ``r = A_{l-1} r_{l-1} + B_{l-1} u_{l-1}``.

    Attributes
    ----------
    surrogate : LLV
        Whose mean operators the law rests on.
    gains : (n_layers, order) float64 array
        K_l.
    feedforward : (n_layers,) float64 array
        k_l.
    filter_gains : (n_layers, order) float64 array
        M_l; of no use where the surrogate has bases.

    Examples
    --------
    >>> matrix = llvlit.gain_matrix(model, splits.operating, directions)
    >>> law = llvlit.lqr(llvlit.realize(matrix, order=2), 2.0)
    >>> bool(np.isclose(law.plan() @ law.surrogate.gains(), 2.0, rtol=0.01))
    True
    """

    surrogate: LLV
    gains: np.ndarray
    feedforward: np.ndarray
    filter_gains: np.ndarray = field(repr=False)

    def plan(self) -> np.ndarray:
        """Inputs ``(n_layers,)`` that the law gives on the surrogate itself, which nothing disturbs."""
        state, inputs = np.zeros(self.surrogate.order), []
        for A, B, gain, feedforward in zip(
            self.surrogate.A, self.surrogate.B, self.gains, self.feedforward, strict=True
        ):
            inputs.append(feedforward - gain @ state)
            state = A @ state + B * inputs[-1]
        return np.array(inputs)

    def open_loop(self) -> FeedbackLaw:
        """The same plan without feedback: it is carried out whatever happens on the way."""
        return replace(self, gains=np.zeros_like(self.gains), feedforward=self.plan())


def lqr(
    surrogate: LLV,
    setpoints: float | np.ndarray,
    *,
    tightness: float | np.ndarray = 1000.0,
    weights: np.ndarray | None = None,
    noise: float = 0.01,
) -> FeedbackLaw:
    """Finite-horizon linear-quadratic regulator of a surrogate, for setpoints along depth.

    It minimizes ``sum_l w_l u_l^2 + sum_k q_k (y_k - s_k)^2`` on the surrogate by the time-varying Riccati recursion,
    backward from ``S_L = q_L C_L^T C_L``:

    ``K_l = (w_l + B_l^T S_{l+1} B_l)^-1 B_l^T S_{l+1} A_l``,
    ``S_l = q_l C_l^T C_l + A_l^T S_{l+1} (A_l - B_l K_l)``.

    Cost: ``n_layers`` products of matrices of the surrogate's order.  With a setpoint at the end alone,
    ``S_l`` has rank one and ``K_l`` is in proportion to the adjoint of the output: one number of the state is enough
    (:func:`~llvlit.method.feedback.adjoint_surrogate`).

    Parameters
    ----------
    surrogate
        Of :func:`llvlit.identify` or :func:`llvlit.realize`; its mean operators count.
    setpoints
        Target of the output at the end, or outputs ``(n_layers + 1,)`` at every state; as deviations from the run
        without inputs.  What is asked of state 0 is of no account, since no input comes before it.
    tightness
        How dear a miss is, a number or ``(n_layers + 1,)`` numbers, zero where the output is free: ``q_k = tightness /
        (h_k^T W^-1 h_k)`` with ``h_k`` column k of the surrogate's gain matrix, so that a setpoint on its own is
        missed by ``1 / (1 + tightness)`` of it.
    weights : (n_layers,) array, optional
        ``w_l``, positive.
    noise
        What the filter takes for chance in an output, as a variance, over what disturbs it at each layer; the
        disturbance is taken to be alike in all coordinates of the state.

    Raises
    ------
    InputError
        If setpoints, tightness, weights or noise do not fit.
    NumericalError
        If no input moves an output that has a setpoint.

    Examples
    --------
    >>> surrogate = llvlit.identify(model, splits.operating, directions, order=8, basis="reachability")
    >>> law = llvlit.lqr(surrogate, 2.0)
    >>> bool(np.allclose(law.plan(), llvlit.minimum_energy(surrogate.gains(), 2.0), rtol=0.01))
    True
    """
    instance("surrogate", surrogate, LLV, "a surrogate, as identify or realize gives it")
    A, B, C, n_layers = surrogate.A, surrogate.B, surrogate.outputs, surrogate.n_layers
    weights = np.ones(n_layers) if weights is None else array("weights", weights, (n_layers,), positive=True)
    noise = number("noise", noise, above=0)
    goals, tight = array("setpoints", setpoints), array("tightness", tightness)
    at_end = np.zeros(n_layers + 1)
    at_end[-1] = 1
    if not tight.ndim:
        tight = tight * (at_end if not goals.ndim else np.minimum(np.arange(n_layers + 1), 1))
    goals = goals * at_end if not goals.ndim else goals
    goals, tight = array("setpoints", goals, (n_layers + 1,)), array("tightness", tight, (n_layers + 1,))
    if tight.min() < 0 or not tight[1:].any() or tight[0]:
        raise InputError("tightness must be zero at state 0, not negative, and positive at one state or more.")
    reach = (gains_between(A, B, C) ** 2 / weights[:, None]).sum(axis=0)
    still = np.flatnonzero((tight > 0) & (reach == 0))
    if len(still):
        raise NumericalError(f"No input moves the output at state {still[0]}, which has a setpoint.")
    penalties = np.divide(tight, reach, out=np.zeros(n_layers + 1), where=tight > 0)
    gains, feedforward = np.zeros(B.shape), np.zeros(n_layers)
    cost, pull = penalties[-1] * np.outer(C[-1], C[-1]), penalties[-1] * goals[-1] * C[-1]
    for layer in reversed(range(n_layers)):
        size = weights[layer] + B[layer] @ cost @ B[layer]
        gains[layer] = B[layer] @ cost @ A[layer] / size
        feedforward[layer] = B[layer] @ pull / size
        closed = A[layer] - np.outer(B[layer], gains[layer])
        penalty = penalties[layer] * C[layer]
        pull = goals[layer] * penalty + closed.T @ pull
        cost = np.outer(penalty, C[layer]) + A[layer].T @ cost @ closed
    return FeedbackLaw(surrogate, gains, feedforward, _filter(surrogate, noise))


def adjoint_surrogate(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    *,
    max_tokens: int = MAX_TOKENS,
) -> LLV:
    """Surrogate of order one for the output at the end: ``r_l = λ_l^T dx_l``, where it will end without more inputs.

    With the mean adjoint λ_l over the prompts, from one backward pass, ``r_{l+1} = r_l + (λ_l^T v_l) u_l`` and
    ``y = r_L``.  Its regulator for a target at the end is that of the full linear system.  Its left bases are the
    adjoints; outputs before the end are zero, since it does not know them.

    Raises
    ------
    InputError
        If the directions do not fit.

    Examples
    --------
    >>> from llvlit.method.feedback import adjoint_surrogate
    >>> surrogate = adjoint_surrogate(model, splits.operating, directions)
    >>> gains = llvlit.adjoint_gains(model, splits.operating, directions)
    >>> surrogate.order, bool(np.allclose(surrogate.gains(), gains.mean, atol=1e-3))
    (1, True)
    """
    along = as_directions(directions)
    vectors, tokens = along.on(model), tokens_of(model, prompts, max_tokens)
    v = vectors.to("cpu", torch.float64).numpy()
    means = np.zeros_like(v)
    means[-1] = v[-1]
    for _, layer, _, adjoints in adjoints_of(model, tokens, vectors[-1:]):
        means[layer] += adjoints.to("cpu", torch.float64).sum(dim=(0, 1)).numpy() / len(tokens)
    h, ones = (means * v).sum(axis=1)[:-1, None], np.ones((model.n_layers, 1, 1))
    return LLV(
        A=ones,
        B=h,
        C=np.ones(1),
        outputs=np.eye(len(v))[:, -1:],
        bases=(means / (means**2).sum(axis=1, keepdims=True))[..., None],
        left_bases=means[..., None],
        orders=np.ones(len(v)),
        per_prompt=ones[None],
        per_prompt_inputs=h[None],
        metadata={**origin(model, tokens), "basis": "adjoint", "order": 1},
        borrowed=borrowed_of(along),
    )


def _filter(surrogate: LLV, noise: float) -> np.ndarray:
    """Gains ``(n_layers, order)`` of the Kalman filter, for disturbances of covariance I at every state."""
    A, C, identity = surrogate.A, surrogate.outputs, np.eye(surrogate.order)
    covariance, gains = np.zeros_like(identity), np.zeros(surrogate.B.shape)
    for layer in range(surrogate.n_layers):
        covariance = identity + (A[layer - 1] @ covariance @ A[layer - 1].T if layer else 0)
        seen = covariance @ C[layer]
        size = C[layer] @ seen + noise * C[layer] @ C[layer]
        gains[layer] = seen / size if size else 0
        covariance = covariance - np.outer(gains[layer], seen)
    return gains


@dataclass(frozen=True)
class ClosedLoop(Result):
    """What a law did on the full model, prompt by prompt.

    Attributes
    ----------
    inputs : (n_prompts, n_layers) float64 array
    outputs : (n_prompts, n_layers + 1) float64 array
        ``y_l = v_l^T (x_l - xbar_l)`` before layer l is pushed and acts, disturbances included; the last is the shift
        that was reached.
    borrowed : tuple of int
        States that were pushed or read along a borrowed direction.
    metadata : dict
        Model and prompts, by name, fingerprint and number; and under ``surrogate`` those that the law rests on.

    Examples
    --------
    >>> surrogate = llvlit.identify(model, splits.operating, directions, order=8, basis="reachability")
    >>> system = llvlit.depth_system(model, splits.evaluation)
    >>> law = llvlit.lqr(surrogate, 2.0)
    >>> closed, opened = (llvlit.closed_loop(system, one, directions) for one in (law, law.open_loop()))
    >>> misses = [float(np.abs(result.outputs[:, -1] - 2.0).mean()) for result in (closed, opened)]
    >>> misses[0] < misses[1]
    True
    """

    inputs: np.ndarray
    outputs: np.ndarray

    def _about(self) -> str:
        n_prompts, n_layers = self.inputs.shape
        return f"closed loop of {n_layers} layers, {n_prompts} prompts, mean shift {self.outputs[:, -1].mean():.3g}"


def closed_loop(
    system: DepthSystem,
    law: FeedbackLaw,
    directions: DirectionsLike,
    *,
    disturbance: torch.Tensor | None = None,
) -> ClosedLoop:
    """Run a law on the full model, layer by layer: read the state, push, step.

    Parameters
    ----------
    system
        Of any prompts; their operating points are the runs that deviations are counted from.
    disturbance : (n_layers, hidden_size) or (n_prompts, n_layers, hidden_size) tensor, optional
        Added to the state before each layer, ahead of the reading; the law is not told.

    Raises
    ------
    InputError
        If the parts do not fit each other.
    NumericalError
        If the pushed states overflow.

    Examples
    --------
    >>> surrogate = llvlit.realize(llvlit.gain_matrix(model, splits.operating, directions), order=2)
    >>> system = llvlit.depth_system(model, splits.evaluation)
    >>> result = llvlit.closed_loop(system, llvlit.lqr(surrogate, 2.0), directions)
    >>> result.inputs.shape, result.outputs.shape
    ((8, 12), (8, 13))
    """
    states = instance("system", system, DepthSystem, "a system, as depth_system gives it").states
    surrogate = instance("law", law, FeedbackLaw, "a law, as lqr gives it").surrogate
    n_prompts, n_states, hidden_size = states.shape
    along = as_directions(directions)
    vectors = along.on(system)
    array("law.gains", law.gains, (n_states - 1, surrogate.order))
    bases = surrogate.left_bases
    if bases.shape[1] not in (0, hidden_size):
        raise InputError(f"law has bases of {bases.shape[1]} rows; the states of this system have {hidden_size}.")
    model, facts = system.layers[0].model, surrogate.metadata
    if facts.get("model_fingerprint", model.fingerprint) != model.fingerprint:
        raise InputError(f"law is of the model {facts.get('model')}; system is of {model.name}.")
    if bool(facts.get("final_norm")) != bool(system.layers[-1].after):
        raise InputError("law and system must both have the final norm in their last step, or neither: final_norm.")
    added = states.new_zeros(n_states - 1, hidden_size)
    if disturbance is not None:
        added = real_tensor("disturbance", disturbance).to(states)
        if added.shape not in ((n_states - 1, hidden_size), (n_prompts, n_states - 1, hidden_size)):
            raise InputError(
                f"disturbance has shape {tuple(added.shape)}; expected {(n_states - 1, hidden_size)}, or that for "
                f"each of {n_prompts} prompts."
            )
    inputs, outputs = np.zeros((n_prompts, n_states - 1)), np.zeros((n_prompts, n_states))
    x, state = states[:, 0], np.zeros((n_prompts, surrogate.order))
    for layer in range(system.n_layers):
        x = x + added[..., layer, :]
        deviation = (x - states[:, layer]).to(torch.float64)
        outputs[:, layer] = (deviation @ vectors[layer].to(torch.float64)).cpu().numpy()
        if bases.shape[1]:
            state = deviation.cpu().numpy() @ bases[layer]
        else:
            surprise = outputs[:, layer] - state @ surrogate.outputs[layer]
            state = state + surprise[:, None] * law.filter_gains[layer]
        inputs[:, layer] = law.feedforward[layer] - state @ law.gains[layer]
        pushed = x + torch.as_tensor(inputs[:, layer]).to(states)[:, None] * vectors[layer]
        x = system.step(layer, pushed[:, None])[:, 0]
        state = state @ surrogate.A[layer].T + inputs[:, layer, None] * surrogate.B[layer]
    outputs[:, -1] = ((x - states[:, -1]).to(torch.float64) @ vectors[-1].to(torch.float64)).cpu().numpy()
    metadata = {**system.metadata, "surrogate": facts}
    return ClosedLoop(inputs, outputs, borrowed=borrowed_of(along), metadata=metadata)
