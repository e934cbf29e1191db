"""Runs in an environment of its own, without moec: greedy tokens of an artifact by ORTModelForCausalLM, as JSON."""

import importlib.metadata
import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main(directory: str, prompts: list[list[int]], count: int) -> None:
    model = ORTModelForCausalLM.from_pretrained(directory, file_name="model.onnx", use_io_binding=False)
    answers = []
    for prompt in prompts:
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        answers.append(out[0, len(prompt) :].tolist())
    packages = ("optimum-onnx", "optimum", "transformers", "torch", "onnxruntime")
    print(json.dumps({"answers": answers, "versions": {name: importlib.metadata.version(name) for name in packages}}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
