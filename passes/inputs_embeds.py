"""Adds an input of embeddings, so that an app can feed image embeddings among tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.ir.fake_values import fake_mode
from moec.compiler.ir.program import Program, TensorSpec
from moec.passes.base import Pass, PassResult
from moec.passes.rewriting import aten, call, is_call, rewritten

NAME = "inputs_embeds"


@dataclass(frozen=True)
class InputsEmbeds(Pass):
    """Add the input `inputs_embeds` [B, S, H], whose rows replace the embeddings of tokens with a negative id.

    As in transformers, the rows replace the output of the embedding layer, including any scale that it applies. The
    input is optional: it defaults to zeros, and is not used if all ids are valid.

    ```
    %x = embedding(@table, %input_ids)
    ->
    %ids = clamp(%input_ids, 0); %words = embedding(@table, %ids)
    %x = where(unsqueeze(ge(%input_ids, 0), -1), %words, %inputs_embeds)
    ```
    """

    name: ClassVar[str] = "inputs-embeds"

    def run(self, program: Program) -> PassResult:
        """See the class.

        Raises:
            UnsupportedModelError: The token ids do not lead to exactly one embedding.
        """
        graph = program.copy_graph()
        ids = next(node for node in graph.nodes if node.op == "placeholder" and node.target == "input_ids")
        words = _embedded(ids)
        last = list(graph.find_nodes(op="placeholder"))[len(program.inputs) - 1]
        with graph.inserting_after(last):
            fed = graph.placeholder(NAME)
        value = words.meta["val"]
        with fake_mode(graph):
            fed.meta = {"val": torch.empty_like(value), "module": ""}
        users = list(ids.users)
        first = next(node for node in graph.nodes if node.op not in {"placeholder", "get_attr"})
        with graph.inserting_before(first):
            known = call(graph, aten.clamp.default, ids, 0, like=words)
            is_word = call(
                graph, aten.unsqueeze.default, call(graph, aten.ge.Scalar, ids, 0, like=words), -1, like=words
            )
        for user in users:
            user.replace_input_with(ids, known)
        readers = list(words.users)
        with graph.inserting_after(words):
            chosen = call(graph, aten.where.self, is_word, words, fed, like=words)
        for reader in readers:
            reader.replace_input_with(words, chosen)
        default = torch.zeros(1, 1, value.shape[-1], dtype=value.dtype)
        spec = TensorSpec(NAME, ("batch", "sequence", int(value.shape[-1])), value.dtype)
        changed = rewritten(program, graph).replace(
            inputs=(*program.inputs, spec), input_defaults={**program.input_defaults, NAME: default}
        )
        return PassResult(changed, True)


def _embedded(ids: fx.Node) -> fx.Node:
    """The output of the embedding layer for the token ids."""
    found: list[fx.Node] = []
    pending, seen = [ids], {ids}
    while pending:
        for user in pending.pop().users:
            if is_call(user, aten.embedding.default):
                found.append(user)
            elif user not in seen and isinstance(user.meta.get("val"), torch.Tensor):
                if user.meta["val"].dtype == torch.int64 and user.meta["val"].ndim == 2:
                    pending.append(user)
                seen.add(user)
    if len(found) != 1:
        raise UnsupportedModelError(
            f"the token ids lead to {len(found)} embeddings, but inputs_embeds can replace only one",
            hint="export without --inputs-embeds",
        )
    (node,) = found
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_function" or user.meta.get("module") != node.meta.get("module"):
            break
        node = user
    return node
