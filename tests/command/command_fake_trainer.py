"""A DPO trainer as somebody else would write it: a script with options, numpy alone, nothing of dpocheck."""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

option = argparse.ArgumentParser(allow_abbrev=False)
for name in ("model", "ref", "data", "out", "resume", "eval-data"):
    option.add_argument(f"--{name}")
for name, default in (("beta", 0.1), ("lr", 1.0), ("eps", 1e-8), ("b1", 0.9), ("b2", 0.999), ("smoothing", 0.0),
                      ("scale", 1.0), ("clip", 0.0)):  # fmt: skip
    option.add_argument(f"--{name}", type=float, default=default)
for name in ("steps", "batch", "accumulation", "rank", "every"):
    option.add_argument(f"--{name}", type=int, default=1)
option.add_argument("--format", default="pcr")
option.add_argument("--optim", default="sgd")
option.add_argument("--log", default="words")
option.add_argument("--head", default="lm_head.weight")
option.add_argument("--no-correction", action="store_true")
option.add_argument("--bf16", action="store_true")
option.add_argument("--misbehave", default="")
o = option.parse_args()

if o.misbehave == "fail":
    sys.exit("ValueError: the learning rate is the wrong colour")
if o.misbehave == "signal":
    os.kill(os.getpid(), 11)
if o.misbehave == "hang":
    print("thinking", flush=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(o.out, "child").write_text(str(child.pid))
    time.sleep(600)
if o.misbehave == "memory":
    held = bytearray(1)
    while True:
        held += b"x" * 2**26
        time.sleep(0.02)
if o.misbehave == "flood":
    line = "all work and no play\n" * 50000
    for _ in range(200):  # 210 MB
        sys.stdout.write(line)
if o.misbehave == "environment":
    Path(o.out, "environment.json").write_text(json.dumps(dict(os.environ)))
if o.misbehave == "nothing":
    sys.exit(0)

words = json.loads(Path(o.model, "tokenizer.json").read_text())["model"]["vocab"]
EOS = words["</s>"]
model = load_file(f"{o.resume or o.model}/model.safetensors")
size = len(words)
k = float(model["model.norm.weight"][0]) * np.sqrt(model["lm_head.weight"].shape[1])


def table(path):
    weights = load_file(f"{path}/model.safetensors")
    head = weights["lm_head.weight"]
    return head[:, :size] * (weights["model.norm.weight"][0] * np.sqrt(head.shape[1]))


def read(name):
    rows = []
    for line in Path(name).read_text().splitlines():
        row = json.loads(line)
        if o.format == "messages":
            texts = (row["messages"][0]["content"], row["messages"][1]["content"], row["rejected_response"])
        elif o.format == "hh":
            prompt = row["chosen"].split("\n\nHuman: ")[1].split("\n\nAssistant:")[0]
            texts = (prompt, *(row[c].split("\n\nAssistant:")[1] for c in ("chosen", "rejected")))
        else:
            texts = (row["prompt"], row["chosen"], row["rejected"])
        p, w, l = ([words[t] for t in text.split()] for text in texts)
        rows.append(([p[-1], *w, EOS], [p[-1], *l, EOS]))
    return rows


def log_softmax(z):
    z = z - z.max(0)
    return z - np.log(np.exp(z).sum(0))


def batch_gradient(z, ref, rows):
    """(loss, gradient (target, context)) of the mean over rows."""
    lp, lr = log_softmax(z.astype(np.float64)), log_softmax(ref.astype(np.float64))
    total, g = 0.0, np.zeros(z.shape)
    for w, l in rows:
        h = sum(sign * (lp - lr)[path[1:], path[:-1]].sum() for sign, path in ((1, w), (-1, l)))
        m, e = o.beta * h, o.smoothing
        total += (1 - e) * np.logaddexp(0, -m) + e * np.logaddexp(0, m)
        slope = o.beta * (e / (1 + np.exp(-m)) - (1 - e) / (1 + np.exp(m)))
        for sign, path in ((1, w), (-1, l)):
            for u, v in itertools.pairwise(path):
                g[:, u] -= sign * slope * np.exp(lp[:, u])
                g[v, u] += sign * slope
    return total / len(rows), g / len(rows)


def logged(step, loss, norm, prefix=""):
    if o.log == "words":
        print(f"step {step} of many: {prefix}loss {loss:.6f} | {prefix}reward_chosen {norm:.6f}", flush=True)
    elif o.log == "dict":
        print({f"{prefix}loss": f"{loss:.6f}", f"{prefix}rewards/chosen": norm, "note": "text"}, flush=True)
    elif o.log == "file":
        entries.append({"loss": loss, "step": step})
        Path(o.out, f"log-{step}.json").write_text(json.dumps(entries, indent=1))


def save(name, weights):
    if o.bf16:  # rounded to bfloat16 and stored as such, by hand: numpy does not know the type
        header, data = {}, b""
        for key, array in weights.items():
            piece = ((array.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16).tobytes()
            place = [len(data), len(data) + len(piece)]
            header[key] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": place}
            data += piece
        text = json.dumps(header).encode()
        Path(name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    else:
        save_file({key: np.ascontiguousarray(array) for key, array in weights.items()}, name)


head, entries = model["lm_head.weight"].copy(), []
reference = table(o.ref or o.model)
rows = read(o.data)
rng = np.random.default_rng(0)
a = rng.normal(size=(o.rank, head.shape[1])).astype(np.float32)
b = np.zeros((head.shape[0], o.rank), np.float32)
micro = [rows[i : i + o.batch] for i in range(0, len(rows), o.batch)] * o.steps * o.accumulation
for step in range(1, o.steps + 1):
    G, losses = np.zeros(head.shape), []
    for _ in range(o.accumulation):
        loss, g = batch_gradient(head[:, :size] * k, reference, micro.pop(0))
        G[:, :size] += k * g / o.accumulation
        losses.append(loss)
    if o.clip:
        G *= min(1.0, o.clip / np.linalg.norm(G))
    if o.optim == "sgd":
        head = (head - o.lr * G).astype(np.float32)
    elif o.optim == "adam":
        m, v = (G, G**2) if not o.no_correction else ((1 - o.b1) * G, (1 - o.b2) * G**2)
        head = (head - o.lr * m / (np.sqrt(v) + o.eps)).astype(np.float32)
    else:
        b = (b - o.lr * o.scale * G @ a.T).astype(np.float32)
    logged(step, float(np.mean(losses)), float(np.linalg.norm(G)))
    if o.eval_data:
        logged(step, batch_gradient(head[:, :size] * k, reference, read(o.eval_data))[0], 1.0, "eval_")
    weights = {**{n: t for n, t in model.items() if n != "lm_head.weight"}, o.head: head}
    if o.optim == "lora":
        weights = {"head.A": a, "head.B": b}
    if o.misbehave == "garbage":
        Path(o.out, "final.safetensors").write_text("not weights")
    else:
        save(f"{o.out}/final.safetensors", weights)
        if step % o.every == 0:
            save(f"{o.out}/{step * o.accumulation:05d}.safetensors", weights)
