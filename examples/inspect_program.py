"""Capture a checkpoint, run the common passes and print the Program. No weight is read."""

from pathlib import Path

from moec import passes
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.printing import format_graph

CHECKPOINT = Path(__file__).resolve().parents[1] / "golden_models" / "olmoe-tiny"

program, log = passes.run_passes(capture(Checkpoint.open(CHECKPOINT)), passes.default_passes())
for layer in program.layers:
    print(f"{layer.module}: {layer.num_experts} experts, top_k {layer.top_k}, width {layer.intermediate_size}")
print("passes that modified the Program:", ", ".join(record.name for record in log if record.modified))
print(format_graph(program)[:1500], "...")
