"""What does a whole run give: the logits at the end, the checkpoints, and the history of metrics?

Replays the run step by step on the tables' logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from dpocheck.experiment import TrainExperiment
from dpocheck.observation import TrainSeen
from dpocheck.oracle import logps, objective, step, tokens
from dpocheck.oracle.counting import Sides
from dpocheck.oracle.numbers import rounded
from dpocheck.oracle.optimizer import State, accumulated, update
from dpocheck.oracle.schedule import Plan, Window, plan, rate, weights
from dpocheck.oracle.theory import PAPER, Theory

GLASS = ("glass", "clock")
UNLIKE = ("none", "swapped", "rolled", "batch-mean")  # references that are not the policy's own log-probs


@dataclass
class Run:
    """A run in progress: what never changes, and what has been remembered."""

    experiment: TrainExperiment
    theory: Theory
    pairs: tuple[Sides, ...]
    earlier: Run | None = None  # the run before this one in the same folder
    keep: bool = False
    states: dict[int, State] = field(default_factory=dict)  # step -> state
    history: list[dict] = field(default_factory=list)
    batches: dict = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.experiment.policy.size

    def batch(self, pairs: tuple[Sides, ...], index: tuple[int, ...]) -> step.Batch:
        key = (id(pairs), index)
        if key not in self.batches:
            tokenizer = self.experiment.tokenizer
            compiled = step.compile_batch(
                [pairs[i] for i in index], self.theory, kind=self.experiment.body.kind, size=self.size,
                eos=tokenizer.eos, pad=tokenizer.pad,
            )  # fmt: skip
            self.batches[key] = (compiled, pairs)
        return self.batches[key][0]

    def split(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Parameters as the table and, under a glass body, the block."""
        return parameters[: self.size], parameters[self.size :] if len(parameters) > self.size else None


def train(experiment: TrainExperiment, theory: Theory = PAPER) -> TrainSeen:
    """A run in a folder of its own.  Nothing is predicted for one that resumes what is not there."""
    return _seen(replay(experiment, theory))


def train_in_sequence(runs: tuple[TrainExperiment, ...], theory: Theory = PAPER) -> tuple[TrainSeen, ...]:
    """Runs that share a folder: a run with `resume_from` goes on from the state that an earlier one saved."""
    seen, earlier = [], None
    for experiment in runs:
        earlier = replay(experiment, theory, earlier)
        seen.append(_seen(earlier))
    return tuple(seen)


def replay(experiment: TrainExperiment, theory: Theory, earlier: Run | None = None, keep: bool = False) -> Run:
    """Go through a run.  `earlier`: the one before it in the same folder.  `keep`: remember the state at every step."""
    run = Run(experiment, theory, tokens.dataset(experiment, experiment.rows, theory), earlier, keep)
    recipe = experiment.recipe
    if experiment.policy is None or experiment.body.kind == "speaking":
        run.history += _first_entry(run)
        return run
    states, done = run.states, 0
    states[0] = _start(run)
    if recipe.resume_from is not None:
        while earlier is not None and recipe.resume_from not in earlier.states:
            earlier = earlier.earlier
        if earlier is None:
            states.clear()
            return run
        done = recipe.resume_from
        states[done] = _resumed(earlier.states[done], states[0], theory)
    _steps(run, plan(len(run.pairs), recipe, theory), done)
    return run


def _first_entry(run: Run) -> list[dict]:
    """What the first step of any model logs where the policy is its own reference: all log-ratios are 0.

    Determined whatever the log-probs, for losses of the log-ratios alone.
    """
    experiment, theory = run.experiment, run.theory
    recipe = experiment.recipe
    start = plan(len(run.pairs), recipe, theory)
    own = experiment.reference is None and experiment.edited is None and theory.reference not in UNLIKE
    same_rule = theory.counted_reference in (None, theory.counted) and theory.logps_reference in (None, theory.logps)
    ratios_alone = theory.coefficients == PAPER.coefficients and theory.beta_on != "policy"
    asked = recipe.objective
    plain = objective.kind_of(asked, theory) != "simpo" and not (asked.sft_weight or theory.sft_extra)
    if not (own and same_rule and ratios_alone and plain and start.steps) or recipe.resume_from is not None:
        return []
    if theory.margin == "policy" or theory.rewards in ("policy-only", "sum") or theory.accuracy == "logps":
        return []
    metrics = []
    for index in start.window(0):
        zeros, ones = np.zeros((4, len(index))), np.ones((4, len(index)))
        loss = objective.preference(zeros, ones, recipe.objective, theory)
        found = step.batch_metrics(loss, ones[:2], recipe.objective, theory)
        metrics.append({name: value for name, value in found.items() if not name.startswith("logps/")})
    logged = _over_window(metrics, [len(index) for index in start.window(0)], theory)
    return [{"step": 1, "split": "train", "metrics": logged}]


def _start(run: Run) -> State:
    """Policy and reference before the first step."""
    experiment, theory, dtype = run.experiment, run.theory, run.experiment.recipe.dtype
    on_disk = experiment.policy if experiment.edited is None else experiment.edited
    policy = on_disk if theory.policy == "disk" else experiment.policy
    reference = experiment.reference
    if reference is None:
        reference = on_disk if theory.reference == "disk" else policy
    if theory.reference == "policy-start":
        reference = policy
    height = 2 * run.size if experiment.body.kind in GLASS else run.size

    def parameters(table) -> np.ndarray:
        filled = np.zeros((height, run.size))
        filled[: run.size] = logps.dense(table, dtype)
        return filled

    return State(parameters(policy), parameters(reference))


def _resumed(state: State, start: State, theory: Theory) -> State:
    if theory.resume == "momentum-lost":
        return replace(state, buffer=None)
    if theory.resume == "reference-from-checkpoint":
        return replace(state, reference=state.logits)
    if theory.resume == "weights-bfloat16":
        return replace(state, logits=rounded(state.logits, "bfloat16"))
    return state


def _steps(run: Run, plan_: Plan, done: int) -> None:
    """All steps after the first `done`.  Where the state is not determined, the history says only what is."""
    recipe, theory = run.experiment.recipe, run.theory
    exact = recipe.optimizer == "sgd" and recipe.lora is None
    state: State | None = run.states[done]
    for number in range(done, plan_.steps):
        at = {"data-restarts": number - done, "skips-batch": number + (done > 0)}.get(theory.resume, number)
        speed = rate(number - done if theory.resume == "schedule-restarts" else number, plan_.steps, recipe, theory)
        after = rate(number + 1 - (done if theory.resume == "schedule-restarts" else 0), plan_.steps, recipe, theory)
        metrics = {"learning_rate": speed if theory.rate_logged == "own" else after}
        if state is not None and plan_.known:
            state, found = _step(run, state, plan_, plan_.window(at), speed)
            metrics = found | metrics
            if exact:
                run.states[number + 1] = state
            else:
                metrics.pop("grad_norm")
                state = None
        else:
            state = None
        run.history.append({"step": number + 1, "split": "train", "metrics": metrics})
        every = recipe.eval_every
        if state is not None and (number + 1 == plan_.steps or (every and (number + 1) % every == 0)):
            run.history += _evaluations(run, state, number + 1)
        _forget(run, number, plan_.steps)


def _forget(run: Run, step_: int, steps: int) -> None:
    """Keep the states that can be asked for: the first, saved ones and the last."""
    every = run.experiment.recipe.save_every
    if not run.keep and 0 < step_ < steps and not (every and step_ % every == 0):
        run.states.pop(step_, None)


def _step(run: Run, state: State, plan_: Plan, window: Window, speed: float) -> tuple[State, dict[str, float]]:
    recipe, theory = run.experiment.recipe, run.theory
    shares = weights(window, plan_, theory)
    gradients, metrics = [], []
    for index, share in zip(window, shares, strict=True):
        out = outcome(run, state, run.pairs, index)
        metrics.append(out.metrics)
        gradients.append(stacked(out.table, out.block))
        if theory.accumulation == "updates":
            state = update(state, share * gradients[-1], speed, recipe, theory)
    total = accumulated(gradients, shares, recipe, theory)
    logged = _over_window(metrics, [len(index) for index in window], theory)
    logged["grad_norm"] = float(np.linalg.norm(total)) * state.shrunk
    if theory.norm_logged == "clipped" and recipe.clip_norm is not None:
        logged["grad_norm"] = min(logged["grad_norm"], recipe.clip_norm)
    if theory.accumulation != "updates":
        state = update(state, total, speed, recipe, theory)
    return state, logged


def outcome(
    run: Run, state: State, pairs: tuple[Sides, ...], index: tuple[int, ...], backward: bool = True
) -> step.BatchOut:
    """One batch of one of the run's sets, at a state."""
    batch = run.batch(pairs, index)
    reference = _reference(run, state, batch, index, pairs)
    return step.run_batch(
        *run.split(state.logits), reference, batch, run.experiment.recipe.objective, run.theory,
        dtype=run.experiment.recipe.dtype, backward=backward,
    )  # fmt: skip


def stacked(table: np.ndarray, block: np.ndarray | None) -> np.ndarray:
    """A table's and a glass block's numbers in one array, as a state holds them."""
    return table if block is None else np.concatenate([table, block])


def _reference(
    run: Run, state: State, batch: step.Batch, index: tuple[int, ...], pairs: tuple[Sides, ...]
) -> np.ndarray:
    """(row,): reference log-probs of a batch, remembered as long as the reference stands still."""
    theory = run.theory
    key = ("reference", id(pairs), index)
    moves = bool(theory.reference_moves)
    if moves or key not in run.batches:
        rows = step.reference_rows(*run.split(state.reference), batch, theory)
        if run.experiment.recipe.precompute_reference and pairs is run.pairs:
            rows = _cached(run, state, rows, index)
        run.batches[key] = rows
    return run.batches[key]


def _cached(run: Run, state: State, rows: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    """What a faulty cache of reference log-probs gives back in the place of `rows`."""
    rule = run.theory.cache
    if rule == "bfloat16":
        return rounded(rows, "bfloat16")
    if rule == "batch-position":
        first = run.batch(run.pairs, tuple(range(len(index))))
        return step.reference_rows(*run.split(state.reference), first, run.theory)
    source = run
    while source.earlier is not None and source.earlier.states:
        source = source.earlier
    if rule == "stale" and source is not run:
        again = tuple(i % len(source.pairs) for i in index)
        start = source.states[min(source.states)]
        return step.reference_rows(*source.split(start.reference), source.batch(source.pairs, again), run.theory)
    return rows


def _mean(values: list[float], counts: list[int], by_pairs: bool) -> float:
    return float(np.average(values, weights=counts if by_pairs else None))


def _over_window(metrics: list[dict[str, float]], counts: list[int], theory: Theory) -> dict[str, float]:
    """What is logged of the micro-batches of one step."""
    logged = {}
    for name in metrics[0]:
        values = [found[name] for found in metrics]
        rule = theory.loss_logged if name == "loss" else theory.window_metrics
        mean = _mean(values, counts, theory.uneven_metrics == "pairs")
        logged[name] = {
            "mean": mean, "last": values[-1], "sum": float(sum(values)), "divided-twice": mean / len(values),
        }[rule]  # fmt: skip
    return logged


def _evaluations(run: Run, state: State, number: int) -> list[dict]:
    return [
        {"step": number, "split": name, "metrics": metrics}
        for name, rows in run.experiment.evaluation
        if (metrics := _evaluate(run, state, tokens.dataset(run.experiment, rows, run.theory)))
    ]


def _evaluate(run: Run, state: State, pairs: tuple[Sides, ...]) -> dict[str, float]:
    """Means over all pairs of a held-out set, batch by batch."""
    theory, batches = run.theory, evaluation_batches(run, len(pairs))
    found = [outcome(run, state, pairs, index, backward=False).metrics for index in batches]
    counts = [len(index) for index in batches]
    return {
        name: _mean([m[name] for m in found], counts,
                    (theory.eval_loss if name == "loss" else theory.eval_metrics) == "pairs")
        for name in (found[0] if found else ())
    }  # fmt: skip


def evaluation_batches(run: Run, pairs: int) -> list[tuple[int, ...]]:
    width = run.experiment.recipe.eval_batch
    batches = [tuple(range(pairs))[i : i + width] for i in range(0, pairs, width)]
    if run.theory.eval_tail == "dropped" and batches and len(batches[-1]) < width:
        batches.pop()
    return batches


def _seen(run: Run) -> TrainSeen:
    """What can be read off a finished run."""
    recipe, states = run.experiment.recipe, run.states
    if not states:
        return TrainSeen(via="oracle", history=tuple(run.history) or None)
    total = max([0, *(entry["step"] for entry in run.history if entry["split"] == "train")])
    last = states.get(total)
    gradient = block = logits = None
    if last is not None:
        logits = run.split(last.logits)[0]
        if total == 1 and 0 in states and recipe.learning_rate:
            gradient, block = run.split(last.moved / recipe.learning_rate)
    saved = None
    if recipe.save_every and last is not None:
        saved = {n: run.split(s.logits)[0] for n, s in states.items() if n and n % recipe.save_every == 0}
    return TrainSeen(
        via="oracle", logits=logits, gradient=gradient, attended=block, saved=saved, history=tuple(run.history)
    )
