"""Is the reference frozen, the right one, and the same whether asked online or once and kept on disk?

Run alone: pytest tests/reference/test_trainer_reference.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_tiny import gpt2, llama, numbers, pairs, save, state, tokenizer
from trainer_tiny import rows as text_rows

from reference_impl import LoraSettings, TrainConfig, refcache, train
from reference_impl import reference as reference_module
from reference_impl.models import ModelError

peft = pytest.importorskip("peft")
BASE = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant", "dtype": "fp64", "steps": 6, "batch": 3}


def run(model: Any, data: Any, reference: Any = None, eval_rows: Any = None, tok: Any = None, **settings: Any) -> Any:
    config = TrainConfig(**{**BASE, **settings})
    return train(config, model=model, reference=reference, train_rows=data, eval_rows=eval_rows, tokenizer=tok)


def sure(history: list[dict[str, Any]]) -> list[Any]:
    """Without accuracies where policy and reference are equal: rounding then decides who wins."""
    kept = numbers(history)
    for _, split, metrics in kept:
        if split != "summary" and abs(metrics["rewards/margins"]) < 1e-6:
            for name in [n for n in metrics if n.startswith("rewards/accuracies")]:
                del metrics[name]
    return kept


def cached(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def trained_adapter(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True, **settings)
    model = peft.get_peft_model(gpt2(), lora, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("given", ["none", "another model"])
def test_precomputed_equals_online(given: str, tmp_path: Path) -> None:
    """Other batches, so other padding: float64 rounding, and no more, under GPT-2's float64 norms."""
    histories, weights = [], []
    for settings in ({}, {"reference_logps": "precomputed", "reference_batch": 2, "reference_cache": str(tmp_path)}):
        policy = gpt2(0)
        reference = gpt2(1) if given == "another model" else None
        result = run(policy, pairs(7), reference=reference, eval_rows={"held": pairs(4, 1)}, **settings)
        histories.append(sure(result.history))
        weights.append(state(policy))
    for (_, split, online), (_, _, once) in zip(*histories, strict=True):
        assert once == pytest.approx(online, rel=1e-10, abs=1e-12), split
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-11, atol=1e-12)


def test_cache_is_made_once_and_read_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"reference_logps": "precomputed", "reference_cache": str(tmp_path)}
    first = run(gpt2(), pairs(7), **settings)
    monkeypatch.setattr(reference_module.OnlineReference, "__call__", lambda *_: pytest.fail("asked again"))
    second = run(gpt2(), pairs(7), **settings)
    assert numbers(first.history) == numbers(second.history)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_cache_stays_aligned_under_shuffling_and_other_batches(batch: int, tmp_path: Path) -> None:
    """The values come from one cache; online and cached rewards of each step are those of the same pairs."""
    settings = {"reference_logps": "precomputed", "reference_cache": str(tmp_path)}
    run(gpt2(0), pairs(7), reference=gpt2(1), batch=3, seed=1, **settings)
    got = run(gpt2(0), pairs(7), reference=gpt2(1), batch=batch, seed=2, **settings)
    online = run(gpt2(0), pairs(7), reference=gpt2(1), batch=batch, seed=2)
    assert len(cached(tmp_path)) == 1
    for (_, _, once), (_, _, live) in zip(sure(got.history), sure(online.history), strict=True):
        assert once == pytest.approx(live, rel=1e-10, abs=1e-12)


STALE = {
    "weights": {"reference": lambda: gpt2(2)},
    "rows": {"data": pairs(7, seed=9)},
    "a token": {"data": [*pairs(7)[:6], pairs(7)[6].__class__(19, (1,), (2,), (3,))]},
    "dtype": {"dtype": "fp32"},
}


@pytest.mark.parametrize("change", STALE)
def test_other_inputs_never_read_a_stale_cache(change: str, tmp_path: Path) -> None:
    given = {"reference": lambda: gpt2(1), "data": pairs(7), "dtype": "fp64"}
    settings = {"reference_logps": "precomputed", "reference_cache": str(tmp_path)}
    for inputs in (given, {**given, **STALE[change]}):
        result = run(gpt2(0), inputs["data"], reference=inputs["reference"](), dtype=inputs["dtype"], **settings)
        online = run(gpt2(0), inputs["data"], reference=inputs["reference"](), dtype=inputs["dtype"])
        bound = 1e-10 if inputs["dtype"] == "fp64" else 1e-3  # batches differ: float32 logps near 20 round to 2e-6
        for (_, _, once), (_, _, live) in zip(sure(result.history), sure(online.history), strict=True):
            assert once == pytest.approx(live, rel=bound, abs=bound / 100)
    assert len(cached(tmp_path)) == 2


@pytest.mark.parametrize(
    "settings",
    [{"max_length": 5}, {"max_length": 5, "truncation": "keep_end"}, {"max_length": None}],
)
def test_truncation_and_tokenizer_are_in_the_key(settings: dict, tmp_path: Path) -> None:
    common = {"reference_logps": "precomputed", "reference_cache": str(tmp_path), "dtype": "fp32"}
    run(llama(), text_rows(8), tok=tokenizer(), **common)
    run(llama(), text_rows(8), tok=tokenizer(), **common, **settings)
    assert len(cached(tmp_path)) == 2
    words = ["<pad>", "<s>", "</s>", "<unk>", *[f"w{i}" for i in reversed(range(28))]]
    run(llama(), text_rows(8), tok=tokenizer(words=words), **common)
    assert len(cached(tmp_path)) == 3


def flip_byte(folder: Path) -> None:
    file = folder / refcache.FILE
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def cut_short(folder: Path) -> None:
    file = folder / refcache.FILE
    file.write_bytes(file.read_bytes()[:-9])


def other_rows_honestly_hashed(folder: Path) -> None:
    """Damage that the file's hash does not show: the rows inside are others."""
    from reference_impl.files import whole_folder

    tensors = load_file(folder / refcache.FILE)
    tensors["row"] = tensors["row"].flip(0).contiguous()
    key = folder.name
    with whole_folder(folder, {"key": key}) as writing:
        save_file(tensors, writing / refcache.FILE)


def moved_under_another_key(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["facts"]["key"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    "a flipped byte": flip_byte,
    "cut short": cut_short,
    "no file": lambda folder: (folder / refcache.FILE).unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "manifest that is not JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "other rows": other_rows_honestly_hashed,
    "another key": moved_under_another_key,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_cache_is_made_again_never_used(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="reference_impl")  # the command line sets it for its whole process
    settings = {"reference_logps": "precomputed", "reference_cache": str(tmp_path)}
    expected = run(gpt2(0), pairs(7), reference=gpt2(1), **settings)
    folder = cached(tmp_path)[0]
    DAMAGE[kind](folder)
    again = run(gpt2(0), pairs(7), reference=gpt2(1), **settings)
    assert numbers(again.history) == numbers(expected.history)
    assert "made again" in caplog.text
    caplog.clear()
    run(gpt2(0), pairs(7), reference=gpt2(1), **settings)
    assert "made again" not in caplog.text


def test_reference_leaves_memory_after_precomputing(tmp_path: Path) -> None:
    import gc
    import weakref

    reference_path = save(tmp_path / "r", llama(1))
    alive: list[Any] = []

    def models() -> list[Any]:
        gc.collect()
        return [m for m in gc.get_objects() if type(m).__name__ == "LlamaForCausalLM"]

    class Watcher:
        def started(self, run: Any, first_step: int) -> None:
            alive.append([m for m in models() if m not in others and m is not keep()])

        def row(self, *_: Any) -> None: ...

    policy = llama(0)
    keep = weakref.ref(policy)
    others = weakref.WeakSet(models())  # of other tests
    config = TrainConfig(
        reference=reference_path, reference_logps="precomputed", steps=1, output_dir=str(tmp_path / "o")
    )
    train(config, model=policy, tokenizer=tokenizer(), train_rows=text_rows(4), watcher=Watcher())
    assert alive == [[]]


def test_reference_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    reference = llama(1)
    with torch.no_grad():
        reference.lm_head.weight.fill_(3e38)
    with pytest.raises(ModelError, match=r"row 1 .* not finite"):
        run(
            llama(), pairs(4), reference=reference, dtype="fp32",
            reference_logps="precomputed", reference_cache=str(tmp_path),
        )  # fmt: skip
    assert cached(tmp_path) == []


# LoRA


def test_fresh_adapter_starts_at_log_two_trains_the_adapter_alone_and_needs_no_copy() -> None:
    base = gpt2()
    before = state(base)
    seen: list[Any] = []

    class Watcher:
        def started(self, run: Any, first_step: int) -> None:
            seen.append(run.references["train"])

        def row(self, *_: Any) -> None: ...

    config = TrainConfig(**{**BASE, "lora": LoraSettings(rank=2, targets=("c_attn",)), "batch": 6})
    result = train(config, model=base, train_rows=pairs(6), watcher=Watcher())
    assert isinstance(seen[0], reference_module.AdapterReference)
    assert seen[0].frozen is None
    assert result.history[0]["metrics"]["loss"] == pytest.approx(math.log(2), abs=1e-15)
    assert result.history[-2]["metrics"]["loss"] < math.log(2)
    after = {n.replace(".base_layer", "").removeprefix("base_model.model."): v for n, v in state(result.model).items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {p.dtype for p in result.model.parameters()} == {torch.float64}


def test_rewards_of_an_adapter_are_against_the_base_model() -> None:
    """The same steps with the adapter off and with a separate copy of the base as the reference."""
    histories = []
    for reference in (None, gpt2(0)):
        lora = LoraSettings(rank=2, targets=("c_attn",))
        histories.append(sure(run(gpt2(0), pairs(6), reference=reference, lora=lora).history))
    for (_, _, off), (_, _, separate) in zip(*histories, strict=True):
        assert off == pytest.approx(separate, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_trained_adapter_is_its_own_reference(modules_to_save: Any) -> None:
    """Continuing an SFT adapter: switched off, the base would be the reference, and the first loss not log 2."""
    model = trained_adapter(modules_to_save=modules_to_save)
    merged = trained_adapter(modules_to_save=modules_to_save)
    result = run(model, pairs(6), batch=6)
    reference = trained_adapter(modules_to_save=modules_to_save).merge_and_unload()
    expected = run(merged, pairs(6), batch=6, reference=reference)
    assert result.history[0]["metrics"]["loss"] == pytest.approx(math.log(2), abs=1e-15)
    for (_, _, own), (_, _, separate) in zip(sure(result.history), sure(expected.history), strict=True):
        assert own == pytest.approx(separate, rel=1e-8, abs=1e-9)  # merging rounds W + BA once more
    assert list(model.peft_config) == ["default"]
    assert model.active_adapter == "default"
    assert any(p.requires_grad for p in model.parameters())


def test_frozen_copy_of_an_adapter_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    original = reference_module.AdapterReference.close

    def close(self: Any) -> None:
        kept.append({n: p.clone() for n, p in self.policy.model.named_parameters() if f".{self.frozen}." in n})
        original(self)

    monkeypatch.setattr(reference_module.AdapterReference, "close", close)
    model = trained_adapter()
    before = {n: p.clone() for n, p in model.named_parameters() if ".default." in n}
    run(model, pairs(6), optimizer="adamw", weight_decay=0.1)
    assert len(kept[0]) == len(before) > 0
    for name, value in before.items():
        assert torch.equal(kept[0][name.replace(".default.", ".dpo_reference.")], value)
        assert not torch.equal(model.get_parameter(name), value)


def test_copy_of_the_head_that_was_changed_makes_an_adapter_not_fresh() -> None:
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    model = peft.get_peft_model(gpt2(tie_word_embeddings=False), lora, autocast_adapter_dtype=False)
    assert reference_module.adapter_changes_nothing(model)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight[0, 0] += 1.0
    assert not reference_module.adapter_changes_nothing(model)


def test_precomputed_reference_of_an_adapter_equals_online(tmp_path: Path) -> None:
    for make in (trained_adapter, gpt2):
        lora = LoraSettings(rank=2, targets=("c_attn",)) if make is gpt2 else None
        online = run(make(), pairs(7), lora=lora)
        once = run(make(), pairs(7), lora=lora, reference_logps="precomputed", reference_cache=str(tmp_path))
        for (_, _, a), (_, _, b) in zip(sure(online.history), sure(once.history), strict=True):
            assert a == pytest.approx(b, rel=1e-10, abs=1e-12)


def test_adapter_with_checkpointing_gets_a_gradient() -> None:
    lora = LoraSettings(rank=2, targets=("q_proj",))
    plain, recomputed = (
        run(llama(), pairs(6), lora=lora, gradient_checkpointing=on, dtype="fp32").history for on in (False, True)
    )
    assert plain[0]["metrics"]["grad_norm"] > 0
    assert numbers(plain) == numbers(recomputed)


def test_adapter_on_an_adapter_is_refused() -> None:
    with pytest.raises(ModelError, match="has an adapter already"):
        run(trained_adapter(), pairs(4), lora=LoraSettings())


def test_prompt_tuning_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match="PROMPT_TUNING"):
        run(peft.get_peft_model(llama(), config), pairs(4))


def test_saved_adapter_is_continued_with_itself_as_the_reference(tmp_path: Path) -> None:
    """A folder with an adapter as `model`: loaded with its base, trained on, and the first loss is log 2."""
    base = save(tmp_path / "base")
    common = {**BASE, "dtype": "fp32", "optimizer": "adamw", "learning_rate": 1e-2, "batch": 8}
    first = train(
        TrainConfig(**common, model=base, lora=LoraSettings(rank=2), output_dir=str(tmp_path / "1")),
        train_rows=text_rows(8),
    )
    more = TrainConfig(**common, model=str(first.final), output_dir=str(tmp_path / "2"))
    again = train(more, train_rows=text_rows(8))
    assert again.history[0]["metrics"]["loss"] == pytest.approx(math.log(2), abs=2**-24)
    start, end = (r.history[i]["metrics"]["logps/chosen"] for r, i in ((again, 0), (first, 5)))
    assert abs(start - end) < abs(start - first.history[0]["metrics"]["logps/chosen"])  # it went on from there
    assert (again.final / "adapter_model.safetensors").is_file()


def test_iterative_run_takes_the_previous_runs_result_as_reference(tmp_path: Path) -> None:
    """Round 2: policy and reference are both what round 1 saved; the first loss is log 2 again."""
    start = save(tmp_path / "start")
    common = {"dtype": "fp32", "batch": 8, "optimizer": "adamw", "learning_rate": 1e-2}
    one = train(
        TrainConfig(**{**BASE, **common, "model": start, "output_dir": str(tmp_path / "1")}), train_rows=text_rows(8)
    )
    assert one.history[-2]["metrics"]["loss"] < 0.69
    saved = str(one.final)
    two = train(
        TrainConfig(**{**BASE, **common, "model": saved, "reference": saved, "output_dir": str(tmp_path / "2")}),
        train_rows=text_rows(8),
    )
    three = train(
        TrainConfig(**{**BASE, **common, "model": saved, "reference": start, "output_dir": str(tmp_path / "3")}),
        train_rows=text_rows(8),
    )
    assert two.history[0]["metrics"]["loss"] == pytest.approx(math.log(2), abs=2**-24)
    assert three.history[0]["metrics"]["loss"] < 0.69
