"""The cells of a notebook: plain functions over dictionaries, and a step that leaves everything else to the caller."""

import torch

BETA = 0.1


def get_logps(model, input_ids, attention_mask, loss_mask):
    logits = model(input_ids, attention_mask=attention_mask).logits
    logps = torch.log_softmax(logits[:, :-1, :], dim=-1)
    picked = torch.gather(logps, 2, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (picked * loss_mask[:, 1:]).sum(dim=1)


def train_step(batch, model, ref_model, optimizer, beta=BETA):
    model.train()
    pi, ref = {}, {}
    for side in ("chosen", "rejected"):
        inputs = (batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_loss_mask"])
        pi[side] = get_logps(model, *inputs)
        with torch.inference_mode():
            ref[side] = get_logps(ref_model, *inputs)
    margin = beta * ((pi["chosen"] - ref["chosen"].clone()) - (pi["rejected"] - ref["rejected"].clone()))
    loss = torch.logaddexp(torch.zeros_like(margin), -margin).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.item(), "reward_margin": margin.mean().item()}
