"""A DPO trainer without torch: a Llama in numpy float64, differentiated by its own tape; weights stay as stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from honest_runs import Own, lines, refuse, split
from safetensors.numpy import load_file, save_file

from dpocheck.adapter import TrainOut, Unsupported


class Tape:
    """An array, and how its gradient flows to what it was made of."""

    def __init__(self, value, *sources):
        self.value, self.sources, self.gradient = value, sources, None

    def __add__(self, other):
        return Tape(self.value + other.value, (self, lambda g: g), (other, lambda g: g))

    def __mul__(self, other):
        return Tape(self.value * other.value, (self, lambda g: fit(g * other.value, self)),
                    (other, lambda g: fit(g * self.value, other)))  # fmt: skip

    def times(self, constant):
        return Tape(self.value * constant, (self, lambda g: fit(g * constant, self)))

    def __matmul__(self, other):
        return Tape(self.value @ other.value, (self, lambda g: g @ other.value.swapaxes(-1, -2)),
                    (other, lambda g: self.value.swapaxes(-1, -2) @ g))  # fmt: skip

    def apply(self, value, slope):
        """A function of each element; `slope` is its derivative there."""
        return Tape(value, (self, lambda g: g * slope))

    def linear(self, change, back):
        """A linear map and its transpose."""
        return Tape(change(self.value), (self, back))

    def backward(self, seed):
        order, seen = [], set()

        def visit(node):
            if id(node) not in seen:
                seen.add(id(node))
                for source, _ in node.sources:
                    visit(source)
                order.append(node)

        visit(self)
        self.gradient = seed
        for node in reversed(order):
            for source, back in node.sources:
                flow = back(node.gradient)
                source.gradient = flow if source.gradient is None else source.gradient + flow


def fit(gradient, node):
    """Summed over the axes that broadcasting added."""
    for _ in range(gradient.ndim - node.value.ndim):
        gradient = gradient.sum(axis=0)
    for axis, size in enumerate(node.value.shape):
        if size == 1 and gradient.shape[axis] != 1:
            gradient = gradient.sum(axis=axis, keepdims=True)
    return gradient


class Llama:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        if self.config["model_type"] != "llama":
            raise Unsupported(self.config["model_type"])
        self.stored = load_file(folder / "model.safetensors")
        self.fresh()

    def fresh(self):
        self.at = {name: Tape(array.astype(np.float64)) for name, array in self.stored.items()}

    def norm(self, x, name):
        square = (x * x).linear(lambda v: v.mean(-1, keepdims=True), lambda g: np.broadcast_to(g, x.value.shape)
                                / x.value.shape[-1])  # fmt: skip
        raised = square.value + self.config["rms_norm_eps"]
        return x * square.apply(raised**-0.5, -0.5 * raised**-1.5) * self.at[name + ".weight"]

    def project(self, x, name):
        return x @ self.at[name + ".weight"].linear(np.transpose, np.transpose)

    def heads(self, x, count):
        length, width = x.value.shape
        return x.linear(lambda v: v.reshape(length, count, -1).swapaxes(0, 1),
                        lambda g: g.swapaxes(0, 1).reshape(length, width))  # fmt: skip

    def turned(self, x):
        """Rotary positions: pairs (i, i + d/2) turn by position / theta^(2i/d)."""
        length, size = x.value.shape[1:]
        angle = np.arange(length)[:, None] / self.config["rope_theta"] ** (np.arange(0, size, 2) / size)
        cos, sin = (np.concatenate([f(angle)] * 2, axis=-1) for f in (np.cos, np.sin))
        half = size // 2

        def rotate(v):
            return np.concatenate([-v[..., half:], v[..., :half]], axis=-1)

        return x.times(cos) + x.linear(lambda v: rotate(v) * sin, lambda g: -rotate(g * sin))

    def attend(self, x, layer):
        count = self.config["num_attention_heads"]
        q, k, v = (self.heads(self.project(x, f"{layer}{n}_proj"), count) for n in "qkv")
        size, length = q.value.shape[-1], q.value.shape[1]
        scores = self.turned(q) @ self.turned(k).linear(lambda v: v.swapaxes(1, 2), lambda g: g.swapaxes(1, 2))
        seen = np.where(np.tri(length, dtype=bool), scores.value * size**-0.5, -np.inf)
        share = np.exp(seen - seen.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        softmax = Tape(share, (scores, lambda g: size**-0.5 * share * (g - (g * share).sum(-1, keepdims=True))))
        mixed = softmax @ v
        joined = mixed.linear(lambda v: v.swapaxes(0, 1).reshape(length, -1),
                              lambda g: g.reshape(length, count, size).swapaxes(0, 1))  # fmt: skip
        return self.project(joined, layer + "o_proj")

    def logp(self, prompt, completion):
        """The summed log-prob of a completion, as a node."""
        ids, start = np.array(prompt + completion), max(len(prompt), 1)
        table = self.at["model.embed_tokens.weight"]

        def scatter(g):
            back = np.zeros_like(table.value)
            np.add.at(back, ids, g)
            return back

        x = table.linear(lambda v: v[ids], scatter)
        for number in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{number}."
            x = x + self.attend(self.norm(x, layer + "input_layernorm"), layer + "self_attn.")
            y = self.norm(x, layer + "post_attention_layernorm")
            gate = self.project(y, layer + "mlp.gate_proj")
            sigma = 1 / (1 + np.exp(-gate.value))
            silu = gate.apply(gate.value * sigma, sigma * (1 + gate.value * (1 - sigma)))
            x = x + self.project(silu * self.project(y, layer + "mlp.up_proj"), layer + "mlp.down_proj")
        logits = self.project(self.norm(x, "model.norm"), "lm_head")
        rows, targets = np.arange(start - 1, len(ids) - 1), ids[start:]
        raw = logits.value[rows]
        shifted = raw - raw.max(-1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

        def back(g):
            flow = np.zeros_like(logits.value)
            flow[rows] = -np.exp(logs)
            flow[rows, targets] += 1.0
            return g * flow

        return Tape(logs[np.arange(len(rows)), targets].sum(), (logits, back))


class NumpyTrainer(Own):
    """SGD and AdamW over the checkpoint's own arrays; what comes back is a folder."""

    def train(self, probe, rows, recipe, folder):
        refuse(recipe)
        self.recipe = recipe
        policy = Llama(probe.policy_path)
        reference = Llama(probe.reference_path or probe.policy_path)
        tokenizer = probe.tokenizer()
        sets = {name: [split(tokenizer, row) for row in lines(held)] for name, held in rows.items()}
        examples, history, saved = sets.pop("train"), [], {}
        self.moments = {name: [np.zeros(a.shape), np.zeros(a.shape)] for name, a in policy.stored.items()}
        number = 0
        for number, window in enumerate(self.windows(len(examples)), 1):
            pairs = [examples[i] for part in window for i in part]
            history.append({"step": number, "split": "train", "metrics": self.update(policy, reference, pairs, number)})
            if recipe.eval_every and number % recipe.eval_every == 0:
                history += self.look(number, sets, policy, reference)
            if recipe.save_every and number % recipe.save_every == 0:
                saved[number] = self.keep(policy, Path(folder) / f"step-{number}")
        history += [] if recipe.eval_every else self.look(number, sets, policy, reference)
        return TrainOut(self.keep(policy, Path(folder) / "trained"), history, saved)

    @staticmethod
    def keep(model, folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def pair(self, policy, reference, pair, slope_of):
        """One pair's metrics; its gradient is left in the policy's nodes."""
        prompt, *sides = pair
        nodes = [policy.logp(prompt, side) for side in sides]
        beta, eps = self.recipe.objective.beta, self.recipe.objective.label_smoothing
        rewards = [beta * (n.value - reference.logp(prompt, s).value) for n, s in zip(nodes, sides, strict=True)]
        m = rewards[0] - rewards[1]
        loss = (1 - eps) * np.logaddexp(0, -m) + eps * np.logaddexp(0, m)
        if slope_of:
            weight = beta * (eps - np.exp(-np.logaddexp(0, m))) / slope_of
            for node, sign in zip(nodes, (1.0, -1.0), strict=True):
                for held in policy.at.values():
                    held.gradient, held.total = None, getattr(held, "total", 0.0)
                node.backward(sign * weight)
                for held in policy.at.values():
                    held.total = held.total + (0.0 if held.gradient is None else held.gradient)
        return {"loss": loss, "rewards/chosen": rewards[0], "rewards/rejected": rewards[1], "rewards/margins": m,
                "rewards/accuracies": float(m > 0), "logps/chosen": nodes[0].value,
                "logps/rejected": nodes[1].value}  # fmt: skip

    def update(self, policy, reference, pairs, number):
        recipe = self.recipe
        policy.fresh()
        told = [self.pair(policy, reference, pair, len(pairs)) for pair in pairs]
        gradients = {name: node.total for name, node in policy.at.items()}
        norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values())))
        shrink = min(1.0, (recipe.clip_norm or np.inf) / (norm + 1e-6))
        for name, gradient in gradients.items():
            new = self.moved(policy.at[name].value, np.asarray(gradient) * shrink, self.moments[name], number)
            policy.stored[name] = new.astype(policy.stored[name].dtype)
        policy.fresh()
        return average(told) | {"grad_norm": norm, "learning_rate": recipe.learning_rate}

    def moved(self, value, gradient, moments, number):
        recipe, (a, b) = self.recipe, self.recipe.betas
        if recipe.optimizer == "sgd":
            gradient = gradient + recipe.weight_decay * value
            moments[0] = gradient if number == 1 else recipe.momentum * moments[0] + gradient
            return value - recipe.learning_rate * moments[0]
        moments[0] = a * moments[0] + (1 - a) * gradient
        moments[1] = b * moments[1] + (1 - b) * gradient**2
        step = moments[0] / (1 - a**number) / (np.sqrt(moments[1] / (1 - b**number)) + recipe.epsilon)
        return value * (1 - recipe.learning_rate * recipe.weight_decay) - recipe.learning_rate * step

    def look(self, number, sets, policy, reference):
        return [
            {"step": number, "split": name, "metrics": average([self.pair(policy, reference, p, None) for p in pairs])}
            for name, pairs in sets.items()
        ]


def average(told):
    return {name: float(np.mean([one[name] for one in told])) for name in told[0]}
