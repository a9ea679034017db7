"""How does the reference go wrong?  Broken part: reference.

Each specimen returns another function from a batch to the reference's log-probs.  Faults of the cache are in `runs`.
"""

from __future__ import annotations

from dataclasses import replace

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import STEPS, mini, specimen, torch


@specimen(
    "reference-is-the-live-policy",
    part="reference",
    caught_by="GRAD-IDENTITY",
    theory=PAPER.but(reference="policy-live"),
    at=STEPS,
    imitates="huggingface/trl#2431",
)
def reference_is_the_live_policy(trainer, policy, given, recipe, examples, folder):
    """The policy, as it is now, is its own reference: the loss stays at log 2."""

    def scorer(batch):
        with torch.no_grad():
            return trainer.logps(trainer.forward(policy, batch), batch)

    return scorer


@specimen(
    "reference-is-the-policy-with-graph",
    part="reference",
    caught_by="GRAD-IDENTITY",
    theory=PAPER.but(reference="policy-graph"),
    at=STEPS,
)
def reference_is_the_policy_with_graph(trainer, policy, given, recipe, examples, folder):
    """The policy is its own reference, and the graph runs through both: the gradient is zero."""
    return lambda batch: trainer.logps(trainer.forward(policy, batch), batch)


@specimen(
    "reference-from-disk",
    part="reference",
    caught_by="REF-IS-POLICY-GIVEN",
    theory=PAPER.but(reference="disk"),
    imitates="huggingface/trl@v1.16.0",
)
def reference_from_disk(trainer, policy, given, recipe, examples, folder):
    """Where none is given, the reference is loaded from the checkpoint that the policy once came from."""
    if given is None and policy.name_or_path and not hasattr(policy, "disable_adapter"):
        given = type(policy).from_pretrained(policy.name_or_path).to(policy.dtype)
    return mini.reference(trainer, policy, given, recipe, examples, folder)


@specimen(
    "given-reference-ignored",
    part="reference",
    caught_by="GRAD-IDENTITY",
    theory=PAPER.but(reference="policy-start"),
    at=STEPS,
    imitates="InternLM/xtuner#781",
)
def given_reference_ignored(trainer, policy, given, recipe, examples, folder):
    """The reference that was given is not used; the policy's start is."""
    return mini.reference(trainer, policy, None, recipe, examples, folder)


@specimen("reference-aliases-the-policy", part="reference", caught_by="REF-IS-POLICY-GIVEN")
def reference_aliases_the_policy(trainer, policy, given, recipe, examples, folder):
    """Where none is given, the reference is the policy itself, not a copy: it moves along."""
    given = policy if given is None and not hasattr(policy, "disable_adapter") else given
    return mini.reference(trainer, policy, given, recipe, examples, folder)


def _changed(id, theory, summary, change, caught_by="GRAD-IDENTITY", imitates=None):
    """Declare a specimen whose reference log-probs are `change` of the honest (2, pair) ones."""

    def part(trainer, policy, given, recipe, examples, folder):
        honest = mini.reference(trainer, policy, given, recipe, examples, folder)
        return lambda batch: change(honest(batch).view(2, -1)).reshape(-1)

    specimen(id, part="reference", caught_by=caught_by, theory=theory, imitates=imitates, at=STEPS, summary=summary)(
        part
    )


_changed(
    "reference-halves-swapped",
    PAPER.but(reference="swapped"),
    "The reference's log-probs of chosen and rejected are exchanged.",
    lambda both: both.flip(0),
)
_changed(
    "reference-off-by-one-row",
    PAPER.but(reference="rolled"),
    "Each pair gets the reference log-probs of its neighbour.",
    lambda both: both.roll(-1, 1),
)
_changed(
    "reference-batch-mean",
    PAPER.but(reference="batch-mean"),
    "Each pair gets the batch's mean reference log-probs.",
    lambda both: both.mean(1, keepdim=True).expand_as(both),
)


def _scored(id, theory, summary, score, imitates=None):
    """Declare a specimen whose reference, and only it, is scored by `score(trainer, model, batch)`."""

    def part(trainer, policy, given, recipe, examples, folder):
        model = given if given is not None else mini.frozen_copy(policy)

        def scorer(batch):
            with torch.no_grad():
                return score(trainer, model, batch)

        return scorer

    specimen(id, part="reference", caught_by="REF-START", theory=theory, imitates=imitates, at=STEPS, summary=summary)(
        part
    )


def _under(trainer, model, batch, mask):
    return trainer.logps(trainer.forward(model, batch), replace(batch, completion_mask=mask))


_scored(
    "reference-averages",
    PAPER.but(logps_reference="mean"),
    "The reference averages where the policy sums.",
    lambda t, m, b: t.logps(t.forward(m, b), b) / b.completion_mask[:, 1:].sum(1).clamp(min=1),
)
_scored(
    "reference-without-eos",
    PAPER.but(counted_reference="no-eos"),
    "The reference leaves out the last token, which the policy counts.",
    lambda t, m, b: _under(t, m, b, b.completion_mask * torch.nn.functional.pad(b.completion_mask[:, 1:], (0, 1))),
    "facebookresearch/fairseq2@online_training",
)
_scored(
    "reference-counts-the-prompt",
    PAPER.but(counted_reference="prompt"),
    "The reference counts the prompt, which the policy does not.",
    lambda t, m, b: _under(t, m, b, b.attention_mask),
)


_changed(
    "reference-log-probs-in-bfloat16",
    None,
    "The reference's log-probs are kept in another precision than the policy's.",
    lambda both: both.to(torch.bfloat16).to(both.dtype),
    "REF-START",
    "huggingface/trl@v1.15.0",
)


def _after_each_step(policy, act):
    """A function to be called before each scoring: it calls `act` once for every step the policy has taken since."""
    seen = [sum(parameter._version for parameter in policy.parameters())]

    def catch_up():
        now = sum(parameter._version for parameter in policy.parameters())
        if now != seen[0]:
            seen[0] = now
            act()

    return catch_up


@specimen(
    "reference-follows-the-policy", part="reference", caught_by="REF-FROZEN", theory=PAPER.but(reference_moves=0.25)
)
def reference_follows_the_policy(trainer, policy, given, recipe, examples, folder):
    """After each step the reference moves a quarter of the way to the policy, undeclared."""
    model = given if given is not None else mini.frozen_copy(policy)

    def move():
        with torch.no_grad():
            for mine, other in zip(model.parameters(), policy.parameters(), strict=True):
                mine.lerp_(other, 0.25)

    catch_up = _after_each_step(policy, move)
    honest = mini.reference(trainer, policy, model, recipe, examples, folder)

    def scorer(batch):
        catch_up()
        return honest(batch)

    return scorer


@specimen("reference-is-trained", part="reference", caught_by="REF-FROZEN")
def reference_is_trained(trainer, policy, given, recipe, examples, folder):
    """The reference keeps its graph and its parameters are in the optimizer: it is trained against the policy."""
    model = (given if given is not None else mini.frozen_copy(policy)).requires_grad_(True)

    def descend():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= recipe.learning_rate * parameter.grad
                    parameter.grad = None

    catch_up = _after_each_step(policy, descend)

    def scorer(batch):
        catch_up()
        return trainer.logps(trainer.forward(model, batch), batch)

    return scorer


@specimen(
    "reference-keeps-its-graph",
    part="reference",
    caught_by="REF-NO-GRAPH",
    at=STEPS,
    imitates="OpenRLHF/OpenRLHF@243615b2",
)
def reference_keeps_its_graph(trainer, policy, given, recipe, examples, folder):
    """The reference runs without no_grad: memory for a graph, and gradients that nobody reads."""
    model = (given if given is not None else mini.frozen_copy(policy)).requires_grad_(True)
    return lambda batch: trainer.logps(trainer.forward(model, batch), batch)


@specimen(
    "reference-in-training-mode",
    part="reference",
    caught_by="REF-NO-DROPOUT",
    at=STEPS,
    imitates="OpenRLHF/OpenRLHF@243615b2",
)
def reference_in_training_mode(trainer, policy, given, recipe, examples, folder):
    """The reference runs in training mode: its dropout is on."""
    model = given if given is not None else mini.frozen_copy(policy)

    def scorer(batch):
        mask = batch.attention_mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model.train()(input_ids=batch.input_ids, attention_mask=mask, position_ids=positions)
        return trainer.logps(out.logits, batch)

    return scorer


# ---------------------------------------------------------------------------------------------------------------- LoRA


@specimen("adapter-stays-on", part="reference", caught_by="LORA-REFERENCE", imitates="huggingface/trl#703")
def adapter_stays_on(trainer, policy, given, recipe, examples, folder):
    """The adapter is not switched off for the reference: policy and reference are the same model."""
    given = policy if given is None and hasattr(policy, "disable_adapter") else given
    return mini.reference(trainer, policy, given, recipe, examples, folder)


@specimen("adapter-training-moves-the-base", part="reference", caught_by="LORA-BASE")
def adapter_training_moves_the_base(trainer, policy, given, recipe, examples, folder):
    """The base weights under an adapter stay trainable: the reference, which is the base, moves along."""
    if hasattr(policy, "disable_adapter"):
        policy.requires_grad_(True)
    return mini.reference(trainer, policy, given, recipe, examples, folder)


@specimen(
    "adapter-run-ignores-the-given-reference",
    part="reference",
    caught_by="LORA-REFERENCE",
    imitates="modelscope/ms-swift#5459",
)
def adapter_run_ignores_the_given_reference(trainer, policy, given, recipe, examples, folder):
    """With an adapter, the base model is the reference even where another was given."""
    given = None if hasattr(policy, "disable_adapter") else given
    return mini.reference(trainer, policy, given, recipe, examples, folder)
