"""A trainer of forty lines with a wrong reference, and its adapter: what stand-alone scripts are tested on."""

from __future__ import annotations

from dpocheck.adapter import Says, TrainOut, Unsupported


def logps(model, prompt, completion):
    import torch

    ids = torch.tensor([prompt + completion])
    scores = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    picked = scores.gather(1, ids[0, 1:, None])[:, 0]
    return picked[len(prompt) - 1 :].sum()


def dpo_step(policy, reference, pairs, beta, rate):
    """One SGD step on the mean loss; the reference is left out: the planted fault."""
    import torch

    losses = []
    for prompt, chosen, rejected in pairs:
        h = logps(policy, prompt, chosen) - logps(policy, prompt, rejected)
        losses.append(-torch.nn.functional.logsigmoid(beta * h))
    loss = torch.stack(losses).mean()
    loss.backward()
    with torch.no_grad():
        policy.lm_head.weight -= rate * policy.lm_head.weight.grad
    return float(loss)


class Adapter:
    name, version, package = "tiny", "1", None
    says = Says(eos="appended")

    def train(self, probe, rows, recipe, folder):
        if recipe.optimizer != "sgd" or recipe.steps != 1:
            raise Unsupported("more than one step of SGD")
        tokenizer, policy = probe.tokenizer(), probe.policy()

        def ids(text):
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        end = [tokenizer.eos_token_id]
        pairs = [(ids(r["prompt"]), ids(r["chosen"]) + end, ids(r["rejected"]) + end) for r in rows["train"]]
        loss = dpo_step(policy, probe.reference(), pairs, recipe.objective.beta, recipe.learning_rate)
        return TrainOut(policy, [{"step": 1, "split": "train", "metrics": {"loss": loss}}])
