"""A model without its weights: built on the meta device, with real rotary tables and fake parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.frontend import architecture, hooks
from moec.compiler.frontend.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model without weights, and its non-persistent buffers before they are rounded to `dtype`."""
    config = checkpoint.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(config).__name__} describes an encoder-decoder: its decoder also attends to what an encoder made",
            hint="moec compiles decoders that AutoModelForCausalLM knows",
        )
    with torch.device("meta"):
        model = architecture.build(
            config, attention=hooks.NAME, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code
        )
    architecture.set_experts(model, hooks.NAME)
    model.eval()  # type: ignore[no-untyped-call]
    return model, _real_buffers(model)


def _real_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Give the non-persistent buffers their values: they are in no checkpoint. The way of from_pretrained itself.

    Returns:
        Those values, in float32 where the model rounds them to half precision.
    """
    owners: dict[str, nn.Module] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, attribute = name.rpartition(".")
        owners[owner], dtypes[name] = model.get_submodule(owner), buffer.dtype
        exact = torch.float32 if buffer.dtype == torch.float16 else buffer.dtype
        real = torch.empty_like(buffer, device="cpu", dtype=exact)
        setattr(owners[owner], attribute, nn.Buffer(real, persistent=False))
    for _, module in sorted(owners.items()):
        model._init_weights(module)  # type: ignore[no-untyped-call]
    values = {name: model.get_buffer(name) for name in dtypes}
    for name, value in values.items():
        owner, _, attribute = name.rpartition(".")
        setattr(owners[owner], attribute, nn.Buffer(value.to(dtypes[name]), persistent=False))
    return values


def fake_parameters(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace what the checkpoint holds by fake CPU tensors; tied parameters stay one."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in fakes:
                    with mode:
                        fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    fakes[id(parameter)] = nn.Parameter(fake, requires_grad=False)
                module._parameters[name] = fakes[id(parameter)]  # type: ignore[assignment]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                with mode:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
