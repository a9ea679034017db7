"""Does DPO find the reward that the preferences came from?  Data, SFT, DPO, verdict and picture, in about a minute."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

OUT = Path("out/train-demo")


@dataclass(frozen=True)
class Sizes:
    """Of a demonstration: pairs, steps and the held-out set."""

    train_pairs: int = 8000
    held_pairs: int = 1000
    sft_steps: int = 200
    epochs: int = 3
    batch: int = 64
    beta: float = 0.5


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True, help="Folder for all results.")
@click.option("--seed", default=0, show_default=True)
@click.option("--fast", is_flag=True, help="A tenth of the size: shows that it runs, not that it converges.")
def command(out: Path, seed: int, fast: bool) -> None:
    """Make preferences with a known reward, train a small Llama on them, and see whether the reward comes back."""
    import torch

    torch.set_num_threads(1)  # the matrices are tiny: a second thread only waits
    demonstrate(out, seed, Sizes(800, 300, 60, 3) if fast else Sizes())


def demonstrate(out: Path, seed: int, sizes: Sizes) -> dict[str, float]:
    """Runs the demonstration; returns and prints what came of it."""
    import copy
    import shutil

    from transformers.utils import logging

    from reference_impl import TrainConfig, load_pairs, train
    from reference_impl.demo import policy, world
    from reference_impl.progress import Screen

    logging.disable_progress_bar()
    began = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tokenizer = world.tokenizer()
    model = policy.new_model(tokenizer, seed)
    with Screen(25, title="SFT") as screen:
        screen.begin(sizes.sft_steps)
        tell = lambda step, loss: screen.step(step, f"loss {loss:.3f}")  # noqa: E731
        policy.supervised(model, tokenizer, sizes.sft_steps, sizes.batch, seed, tell)
    for name, part in (("sft", model), ("sft", tokenizer)):
        part.save_pretrained(out / name)

    train_set = _judged(model, tokenizer, sizes.train_pairs, seed + 1)
    held_set = _judged(model, tokenizer, sizes.held_pairs, seed + 2)
    for name, judged in (("train", train_set), ("held_out", held_set)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(j.row) + "\n" for j in judged), encoding="utf-8")

    config = TrainConfig(
        beta=sizes.beta, learning_rate=5e-4, schedule="cosine", warmup_steps=10, epochs=sizes.epochs,
        batch=sizes.batch, eval_every=25, eval_batch=250, print_every=25, seed=seed, output_dir=str(out / "dpo"),
    )  # fmt: skip
    reference = copy.deepcopy(model)
    with Screen(config.print_every) as screen:
        result = train(
            config,
            model=model,
            tokenizer=tokenizer,
            train_rows=str(out / "train.jsonl"),
            eval_rows={"held_out": str(out / "held_out.jsonl")},
            watcher=screen,
        )
    pairs = load_pairs(str(out / "held_out.jsonl"), tokenizer, max_length=None).pairs
    rewards = policy.implicit_rewards(result.model, reference, pairs, sizes.beta)
    written = _written_rewards(reference, result.model, tokenizer, seed + 3)
    return _verdict(out, result, [held_set[pair.row] for pair in pairs], rewards, written, time.monotonic() - began)


def _judged(model: Any, tokenizer: Any, count: int, seed: int) -> list[Any]:
    """Pairs of the model's own texts, judged; pairs of equal texts, which say nothing, are drawn again."""
    from reference_impl.demo import policy, world

    draw, judged = random.Random(seed), []
    while len(judged) < count:
        asked = [draw.choice(world.prompts()) for _ in range(count + 64 - len(judged))]
        texts = [policy.sample(model, tokenizer, asked, draw.randrange(2**31)) for _ in range(2)]
        rows = [row for row in zip(asked, *texts, strict=True) if row[1] != row[2] and row[1] and row[2]]
        judged += [world.judge(prompt, (one, two), draw) for prompt, one, two in rows]
    return judged[:count]


def _written_rewards(reference: Any, trained: Any, tokenizer: Any, seed: int) -> tuple[float, float]:
    """Mean true reward of texts drawn before and after training."""
    from reference_impl.demo import policy, world

    asked = world.prompts() * 250
    means = []
    for model in (reference, trained):
        texts = policy.sample(model, tokenizer, asked, seed)
        means.append(sum(world.reward(p, t) for p, t in zip(asked, texts, strict=True)) / len(asked))
    return means[0], means[1]


def _verdict(
    out: Path, result: Any, held: list[Any], rewards: Any, written: tuple[float, float], seconds: float
) -> dict[str, float]:
    import numpy

    from reference_impl.demo import plots, world

    true = numpy.array([j.reward_margin for j in held])
    found = (rewards[:, 0] - rewards[:, 1]).double().numpy()
    # The judge's order carries its noise; without it each pair counts in the order it was drawn.
    order = numpy.array([1 - 2 * j.preferred for j in held])
    last = [row["metrics"] for row in result.history if row["split"] == "held_out"][-1]
    best = world.best_accuracy(held)
    numbers = {
        "correlation": float(numpy.corrcoef(order * true, order * found)[0, 1]),
        "slope": float((true * found).sum() / (true * true).sum()),
        "accuracy": last["rewards/accuracies"],
        "best accuracy": best,
        "agreement": float(((found > 0) == (true > 0))[true != 0].mean()),
        "reward before": written[0],
        "reward after": written[1],
        "seconds": seconds,
    }
    title = (
        f"DPO on preferences with a known reward: held-out accuracy {numbers['accuracy']:.3f}, "
        f"best achievable {best:.3f}"
    )
    plots.run_figure(result.history, "held_out", best, (order * true, order * found), title, out / "run.png")
    (out / "verdict.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    interval = f"[{last['rewards/accuracies/low']:.3f}, {last['rewards/accuracies/high']:.3f}]"
    click.echo(f"""
Did the implicit reward recover the known one?  ({len(held)} held-out pairs, never trained on)
  correlation of margins           {numbers["correlation"]:.3f}     1 is perfect
  slope, implicit on true          {numbers["slope"]:.2f}      1 is perfect: the true reward's scale, not only its order
  accuracy against the judge       {numbers["accuracy"]:.3f}     95 % interval {interval}
  best achievable                  {best:.3f}     the true reward itself, the rest is the judge's noise
  agreement with the true order    {numbers["agreement"]:.3f}
  true reward of its own texts     {written[0]:+.2f} before, {written[1]:+.2f} after
model {out / "dpo" / "final"}   plots {out / "run.png"}   {seconds:.0f} s""")
    return numbers


if __name__ == "__main__":
    command()
