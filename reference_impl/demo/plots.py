"""How does a run look in one picture?  Rewards, accuracy, absolute log-probs and the KL proxy against steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, GRID = "#333333", "#dddddd"
CHOSEN, REJECTED, NEUTRAL = "#1b7f79", "#c1440e", "#3b5b92"


def run_figure(
    history: list[dict[str, Any]],
    held_out: str,
    best_accuracy: float,
    recovery: tuple[Any, Any],
    title: str,
    file: Path,
) -> None:
    """Writes the PNG: five plots of a run and, as the sixth, recovered against true reward margins.

    recovery: true margins r(x, y_1) − r(x, y_2) and the policy's implicit ones, (pair,) each.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.4), dpi=130, layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    both = (history, held_out)
    _curve(axes[0], *both, "rewards/chosen", "Reward of chosen", CHOSEN, "β (log π − log π$_{ref}$)")
    _curve(axes[1], *both, "rewards/rejected", "Reward of rejected", REJECTED, "β (log π − log π$_{ref}$)")
    for axis in axes[:2]:
        axis.axhline(0, color=INK, linewidth=0.8)
    _share_limits(axes[0], axes[1])
    _accuracy(axes[2], *both, best_accuracy)
    _curve(axes[3], *both, "logps/chosen", "Absolute log-probs", CHOSEN, "log π(y|x), nats", label="chosen")
    _curve(axes[3], *both, "logps/rejected", "Absolute log-probs", REJECTED, "log π(y|x), nats", label="rejected")
    axes[3].legend(frameon=False, loc="lower left")
    _curve(axes[4], *both, "kl/k1", "KL proxy (k1 on the data's completions)", NEUTRAL, "log π − log π$_{ref}$, nats")
    axes[4].axhline(0, color=INK, linewidth=0.8)
    _recovery(axes[5], *recovery)
    figure.suptitle(title, fontsize=13, color=INK)
    figure.savefig(file)


def _style(axis: Any, title: str, ylabel: str, xlabel: str = "optimizer step") -> None:
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.set_xlabel(xlabel, color=INK)
    axis.set_ylabel(ylabel, color=INK)
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _series(history: list[dict[str, Any]], split: str, name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in history if row["split"] == split]
    return [row["step"] for row in rows], [row["metrics"][name] for row in rows]


def _smooth(values: list[float], window: int = 15) -> list[float]:
    """Trailing means over at most `window` steps."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def _curve(
    axis: Any,
    history: list[dict[str, Any]],
    split: str,
    name: str,
    title: str,
    color: str,
    ylabel: str,
    label: str = "",
) -> None:
    steps, values = _series(history, "train", name)
    axis.plot(steps, values, color=color, alpha=0.18, linewidth=0.8)
    axis.plot(steps, _smooth(values), color=color, alpha=0.45, linewidth=1.2, label="train" if not label else None)
    steps, values = _series(history, split, name)
    axis.plot(steps, values, color=color, linewidth=2, marker="o", markersize=4, label=label or "held out")
    if not label:
        axis.legend(frameon=False)
    _style(axis, title, ylabel)


def _share_limits(left: Any, right: Any) -> None:
    low = min(left.get_ylim()[0], right.get_ylim()[0])
    high = max(left.get_ylim()[1], right.get_ylim()[1])
    for axis in (left, right):
        axis.set_ylim(low, high)


def _accuracy(axis: Any, history: list[dict[str, Any]], split: str, best: float) -> None:
    # While policy and reference are equal every pair is a tie, which is not an accuracy.
    history = [row for row in history if row["metrics"].get("rewards/margins")]
    _curve(axis, history, split, "rewards/accuracies", "Accuracy", NEUTRAL, r"pairs with $\hat{r}_w > \hat{r}_l$")
    steps, low = _series(history, split, "rewards/accuracies/low")
    _, high = _series(history, split, "rewards/accuracies/high")
    axis.fill_between(steps, low, high, color=NEUTRAL, alpha=0.15, linewidth=0)
    axis.axhline(best, color=CHOSEN, linestyle="--", linewidth=1.4, label="best achievable")
    axis.set_ylim(0.5, 1.0)
    axis.legend(frameon=False, loc="lower right")


def _recovery(axis: Any, true: Any, found: Any) -> None:
    import numpy

    true, found = numpy.asarray(true), numpy.asarray(found)
    slope = float((true * found).sum() / (true * true).sum())
    correlation = float(numpy.corrcoef(true, found)[0, 1])
    reach = 1.05 * max(abs(true).max(), abs(found).max())
    axis.scatter(true, found, s=7, color=NEUTRAL, alpha=0.3, linewidth=0)
    axis.plot([-reach, reach], [-reach, reach], color=CHOSEN, linestyle="--", linewidth=1.4, label="equal")
    ends = [-reach, reach]
    axis.plot(ends, [slope * end for end in ends], color=REJECTED, linewidth=1.4, label=f"slope {slope:.2f}")
    axis.set_xlim(-reach, reach)
    axis.set_ylim(-reach, reach)
    axis.legend(frameon=False, loc="upper left")
    title = f"Recovered reward, correlation {correlation:.3f}"
    _style(axis, title, "implicit margin r̂(y₁) − r̂(y₂)", "true margin r(y₁) − r(y₂)")
