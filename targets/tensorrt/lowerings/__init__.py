"""Lowering functions that differ from those of standard ONNX."""
