"""A model without its weights: built on the meta device, with real rotary tables and fake parameters.

The modules that own non-persistent buffers (rotary tables) get real ones, since no checkpoint holds them. Parameters
become fake CPU tensors before the trace.
"""

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
    """Build the model of a checkpoint on the meta device, with moec's hooks for attention, masks and experts.

    Args:
        checkpoint: The checkpoint; its weights are not read.
        dtype: Dtype of the parameters.

    Returns:
        The model, and buffer name -> value of its non-persistent buffers before they are rounded to `dtype`.

    Raises:
        UnsupportedModelError: It is an encoder-decoder, or transformers cannot build it.
    """
    hooks.register()
    return model_without_weights(checkpoint, dtype, attention=hooks.NAME, experts=hooks.NAME)


def model_without_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, *, attention: str, experts: str
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """`meta_model` with other implementations of attention and experts, by their names in transformers."""
    config = checkpoint.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(config).__name__} describes an encoder-decoder, whose decoder also attends to an encoder's output",
            hint="moec compiles decoders that AutoModelForCausalLM knows",
        )
    with torch.device("meta"):
        model = architecture.build(
            config, attention=attention, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code
        )
    architecture.set_experts(model, experts)
    model.eval()  # type: ignore[no-untyped-call]
    return model, _real_buffers(model)


def _real_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Give the non-persistent buffers their values, by `_init_weights` as `from_pretrained` does.

    Returns:
        Buffer name -> value, in float32 where the model rounds it to float16.
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
    """Replace parameters and persistent buffers by fake CPU tensors; tied parameters stay one tensor."""
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
