"""Lowering functions where the TensorRT dialect differs from standard ONNX."""
