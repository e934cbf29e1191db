"""Names of stored tensors: prefixes of training wrappers are removed; adapters and training shards are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from moec.compiler.common.errors import CheckpointError
from moec.compiler.ir.safetensors_file import StoredEntry

_ANYWHERE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Wrapper modules of torch.compile, FSDP and activation checkpointing."""

_PREFIX = "module."
"""Prefix that DistributedDataParallel and DeepSpeed put before every name."""

_ADAPTERS = (
    "lora_A",
    "lora_B",
    "lora_embedding_",
    "lora_magnitude_vector",
    "hada_w1_",
    "lokr_w1",
    "ia3_l",
    "vera_lambda_",
    "base_model.model.",
    "modules_to_save.",
)
"""Parts of names by which the tensors of an adapter are known (https://github.com/huggingface/peft)."""

_FLAT = ("_flat_param", "flat_param_")
"""Names of FSDP's flattened parameters."""


def plain_names(entries: Mapping[str, StoredEntry], where: Path) -> Mapping[str, StoredEntry]:
    """The entries under the names that the model without training wrappers gives them.

    Args:
        entries: Name in the files -> entry.
        where: The checkpoint, for messages.

    Raises:
        CheckpointError: The names are those of an adapter or of flattened FSDP parameters, or two names become equal.
    """
    _refuse_parts_of_training(entries, where)
    around = bool(entries) and all(name.startswith(_PREFIX) for name in entries)
    named: dict[str, StoredEntry] = {}
    for name, entry in entries.items():
        plain = _ANYWHERE.sub("", name.removeprefix(_PREFIX) if around else name)
        if plain in named:
            raise CheckpointError(
                f"{where}: {name} and {named[plain].name} are both {plain} without the prefix of a training wrapper",
                hint="save the model without its wrapper (torch.compile, DDP, FSDP), once",
            )
        named[plain] = entry
    return named


def _refuse_parts_of_training(entries: Mapping[str, StoredEntry], where: Path) -> None:
    adapters = [name for name in entries if any(part in name for part in _ADAPTERS)]
    if adapters:
        raise CheckpointError(
            f"{where}: holds an adapter that is not merged into the weights: {adapters[0]} "
            f"({len(adapters)} such tensors)",
            hint="merge it: peft's model.merge_and_unload().save_pretrained(...), then export that directory",
        )
    flat = [name for name in entries if name.rpartition(".")[2].startswith(_FLAT)]
    if flat:
        raise CheckpointError(
            f"{where}: holds flattened parameters of FSDP: {flat[0]} ({len(flat)} such tensors)",
            hint="save a full state dict: accelerate merge-weights, or StateDictType.FULL_STATE_DICT",
        )
