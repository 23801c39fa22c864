"""When a transformers.Trainer cannot save through Stillframe, and why: it then saves as ever."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from stillframe._torch.tensors import collect_models
from stillframe.errors import InvalidArgument

# These send the folder itself to the Hub, with optimizer.pt in it.
_WHOLE_FOLDER_PUSHES = ("checkpoint", "all_checkpoints")


def reason_against(trainer: Any) -> str | None:
    """Why this trainer saves in the stock way; None if Stillframe serves it."""
    args, model = trainer.args, trainer.model
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed saves in its own way"
    if trainer.is_fsdp_enabled or getattr(trainer, "is_fsdp_xla_enabled", False):
        return "FSDP saves in its own way"
    if args.world_size > 1:
        return f"{args.world_size} processes train, and this version serves one"
    if getattr(args, "n_gpu", 0) > 1:
        return f"the model is spread over {args.n_gpu} GPUs"
    if getattr(model, "is_distributed_loading_by_transformers", False):
        return "the model was sharded when it was loaded"
    if is_peft_model(model):
        return "a PEFT model saves its adapters alone"
    if getattr(model, "hf_quantizer", None) is not None:
        return "the model is quantized"
    if args.push_to_hub and str(getattr(args.hub_strategy, "value", "")) in _WHOLE_FOLDER_PUSHES:
        return f"hub_strategy={args.hub_strategy.value!r} uploads checkpoint folders whole"
    return _reason_against_model(model)


def is_peft_model(model: nn.Module) -> bool:
    """Whether adapters are attached to it, in either way; imports nothing."""
    return getattr(model, "_hf_peft_config_loaded", False) or any(
        kind.__module__.split(".")[0] == "peft" for kind in type(model).__mro__
    )


def _reason_against_model(model: nn.Module) -> str | None:
    model = getattr(model, "_orig_mod", model)
    try:
        ours = set(collect_models({None: model}).tensors)
    except InvalidArgument as error:
        return str(error)
    if not hasattr(model, "save_pretrained"):
        return None
    theirs = published_names(model)
    differing = sorted(ours ^ theirs)
    if differing:
        return (
            f"save_pretrained() writes {type(model).__name__} under other names than its "
            f"state_dict(): {', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}"
        )
    return None


def published_names(model: Any) -> set[str]:
    """The names that save_pretrained() writes: one of tied weights, and conversions undone."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = dict(model.state_dict())
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    # Without memory: some conversions split or join the tensors.
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 converts nothing.
        return set(shapes)
    converted = revert_weight_conversion(model, shapes)
    # An old name for something else is no old name.
    return {
        f"{name} (converted)" if name in shapes and shapes[name].shape != tensor.shape else name
        for name, tensor in converted.items()
    }


def bare_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer in accelerate's wrapper: the one whose step() hooks run."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, Optimizer)
    return optimizer
