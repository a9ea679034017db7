"""How does a causal language model become the policy of a run, and what is refused?

A live model is trained in place and handed back: what was changed for the run (dropout, modes, flags) is undone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reference_impl.config import ConfigError, TrainConfig
from reference_impl.logps import Path as ScorePath
from reference_impl.logps import unwrapped
from reference_impl.reading import FOLDER, files_fit, parameters_on_meta, weights_folder, whole_tensors

log = logging.getLogger("reference_impl")

WEIGHTS = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}
"""dtype setting → dtype of weights, gradients and optimizer."""
DROPOUT_WORDS = ("dropout", "pdrop", "layerdrop", "drop_path", "dropout_prob")


class ModelError(ValueError):
    """A model or tokenizer that cannot be trained as it is; says what to do."""


@dataclass
class Policy:
    """The model being trained and what belongs to it.

    path: how its rows are scored, see logps.pair_logps.
    device: where it computes.
    config_dropout: dropout settings of the model's config before they were set to 0, for what is saved.
    whole: a live model that was passed, where `model` is a copy of it in parts; else `model` itself.
    undo: calls that give the model back as it came, last first.
    """

    model: nn.Module
    tokenizer: Any
    pad_id: int
    dtype: str
    path: ScorePath
    device: torch.device
    whole: nn.Module
    config_dropout: dict[str, Any] = field(default_factory=dict)
    undo: list[Any] = field(default_factory=list)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return precision(self.dtype, self.device)

    def give_back(self) -> None:
        while self.undo:
            self.undo.pop()()


def precision(dtype: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Under bf16 matrix products are made in bfloat16 from float32 weights; otherwise everything stays as it is."""
    if dtype != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def pick_device(name: str) -> torch.device:
    """Raises ConfigError for a device that torch does not know or does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no tokenizer can be loaded from {source!r}: {_first_line(error)}") from error


def check_tokenizer(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's, or EOS where it has none.

    Raises:
        ModelError: no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so the end of a completion could not be learned: "
            "set tokenizer.eos_token to the token that ends a text, and save the tokenizer"
        )
    if tokenizer.pad_token_id is None:
        log.info("the tokenizer has no padding token: %r pads, masked and never scored", tokenizer.eos_token)
        return tokenizer.eos_token_id
    return tokenizer.pad_token_id


def load_model(source: str, dtype: str, device: torch.device) -> nn.Module:
    """A causal LM from a folder or the hub, or a peft adapter with its base, with weights in the setting's dtype."""
    from transformers import AutoModelForCausalLM

    weights = dtype_argument(WEIGHTS[dtype])
    try:
        if (Path(source) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(source, is_trainable=True, **weights)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, **weights)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"no causal language model can be loaded from {source!r}: {_first_line(error)}") from error
    except Exception as error:  # safetensors has an error class of its own, without a common base
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(f"the weights in {source!r} are damaged: {_first_line(error)}") from error
    return model.to(device)


def load_skeleton(source: str, dtype: str) -> nn.Module:
    """The model of load_model without its weights, which are on the meta device; its buffers are as load_model's.

    An adapter comes with its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if (Path(source) / "adapter_config.json").is_file():
        return load_model(source, dtype, torch.device("cpu"))
    try:
        settings = AutoConfig.from_pretrained(source)
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(settings, **dtype_argument(WEIGHTS[dtype]))
        for module in model.modules():  # as from_pretrained, which makes them outside of the weights' dtype
            if module._non_persistent_buffers_set:
                model._init_weights(module)
        with contextlib.suppress(OSError):  # it has none
            model.generation_config = GenerationConfig.from_pretrained(source)
        return model.eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"no causal language model can be made from {source!r}: {_first_line(error)}") from error


def load_unread(source: str, dtype: str) -> nn.Module | None:
    """A skeleton that knows the folder of its weights; None where only the model's own loader can read them."""
    folder = None if (Path(source) / "adapter_config.json").is_file() else weights_folder(source)
    if folder is None:
        return None
    try:
        model = load_skeleton(source, dtype)
    except ModelError:  # load_model says what is wrong
        return None
    if hasattr(model.config, "quantization_config") or not files_fit(model, folder):
        return None
    setattr(model, FOLDER, folder)
    return model


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword of from_pretrained for the weights' dtype; transformers 4.56 renamed it."""
    import transformers
    from packaging.version import Version

    renamed = Version(transformers.__version__).release >= (4, 56)
    return {"dtype" if renamed else "torch_dtype": dtype}


def check_model(model: nn.Module, tokenizer: Any, role: str) -> None:
    """Raises ModelError for weights that are not finite, and for a vocabulary larger than the embedding."""
    check_finite(model, role)
    embeddings = unwrapped(model).get_input_embeddings()
    rows = embeddings.num_embeddings if hasattr(embeddings, "num_embeddings") else embeddings.weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, but the {role}'s embedding only {rows}: "
            "take the model's own tokenizer, or resize_token_embeddings(len(tokenizer)) and train the new rows"
        )


def check_finite(model: nn.Module, role: str) -> None:
    """Raises ModelError for weights that are not finite; of one that lies over processes, in this one's part."""
    for name, tensor in model.named_parameters():
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if not part.is_meta and not torch.isfinite(part).all():
            raise ModelError(f"the {role}'s weight {name} has NaN or infinite values: the checkpoint is damaged")


def check_can_be_saved(model: nn.Module) -> None:
    """Raises ModelError for generation settings that transformers loads but refuses to save: at the first step, not
    after the last."""
    settings = getattr(unwrapped(model), "generation_config", None)
    if settings is None:
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings.save_pretrained(folder)
    except ValueError as error:
        raise ModelError(
            f"the model's generation_config cannot be saved: {_first_line(error)} Correct generation_config.json"
        ) from error


def prepare_policy(model: nn.Module, tokenizer: Any, pad_id: int, config: TrainConfig) -> Policy:
    """Sets dtype, adapter, dropout, checkpointing and training mode.  `Policy.give_back` undoes all but the dtype."""
    model.to(WEIGHTS[config.dtype])
    if config.lora is not None:
        model = add_adapter(model, config)
    elif is_peft(model):
        check_adapter(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("no parameter of the policy requires a gradient: nothing would be trained")
    policy = Policy(model, tokenizer, pad_id, config.dtype, config.logps, next(model.parameters()).device, model)
    modes = {module: module.training for module in model.modules()}
    policy.undo.append(lambda: _restore_modes(modes))
    model.train()
    _dropout_off(policy)
    if config.gradient_checkpointing:
        _checkpointing_on(policy)
    return policy


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def add_adapter(model: nn.Module, config: TrainConfig) -> nn.Module:
    """The model with a fresh LoRA adapter, which changes nothing until it is trained (B is 0)."""
    import peft

    if is_peft(model):
        raise ModelError("the policy has an adapter already: train that one (lora=null), or merge it before a new one")
    settings = config.lora
    targets = "all-linear" if settings.targets == ("all-linear",) else list(settings.targets)
    lora = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        modules_to_save=list(settings.modules_to_save) or None,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        # Without autocast_adapter_dtype=False an adapter on float64 weights would be float32.
        return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigError(f"lora.targets {list(settings.targets)}: {_first_line(error)}") from error


def check_adapter(model: nn.Module) -> None:
    """Raises ModelError for adapters other than one active LoRA."""
    active = list(model.active_adapters)
    kinds = {str(model.peft_config[name].peft_type.value) for name in active}
    if len(active) != 1 or kinds != {"LORA"}:
        raise ModelError(f"the policy's active adapters are {active} of kind {sorted(kinds)}, but should be one LoRA")


def _dropout_off(policy: Policy) -> None:
    """Sets every probability of dropping to 0: of modules, of functional dropout (read from a module's attributes), and
    of the config, which some attention functions read at each call."""
    model = policy.model

    def zero(owner: Any, name: str) -> None:
        value = getattr(owner, name)
        policy.undo.append(lambda: setattr(owner, name, value))
        setattr(owner, name, 0.0 if isinstance(value, float) else 0)

    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            zero(module, "p")
        for name, value in list(vars(module).items()):
            if _is_dropout(name, value):
                zero(module, name)
    for config in _configs(unwrapped(model)):
        for name, value in list(vars(config).items()):
            if _is_dropout(name, value):
                policy.config_dropout[name] = value
                zero(config, name)


def _is_dropout(name: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value != 0 and any(word in name for word in DROPOUT_WORDS)


def _configs(model: nn.Module) -> list[Any]:
    seen: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, dict):
            seen.setdefault(id(config), config)
    return list(seen.values())


def _checkpointing_on(policy: Policy) -> None:
    base = unwrapped(policy.model)
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        return
    # transformers renamed these; the old names warn on each call.
    new = hasattr(base, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    try:
        # Not reentrant: the reentrant kind gives no gradient at all where only an adapter is trained.
        getattr(base, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    except ValueError as error:
        raise ConfigError(f"gradient_checkpointing: {_first_line(error)}") from error
    policy.undo.append(getattr(base, f"{name}_disable"))


def _restore_modes(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def weights_hash(model: nn.Module, skip: str | None = None) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter and buffer, and the architecture's settings.

    skip: parameters with this in their name are left out (an adapter that is switched off).
    """
    digest = hashlib.sha256()
    config = unwrapped(model).config.to_dict()
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
    kept = {k: v for k, v in config.items() if k not in volatile and not any(word in k for word in DROPOUT_WORDS)}
    digest.update(repr(sorted((k, repr(v)) for k, v in kept.items())).encode())
    for name, tensor in whole_tensors(model):
        if skip is not None and skip in name:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient; every module's mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        _restore_modes(modes)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
