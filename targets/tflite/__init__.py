"""The TFLite target: one `.tflite` file for LiteRT, with a branch per expert."""
