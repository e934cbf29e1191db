"""The TFLite target: one `.tflite` file for LiteRT, with one branch per expert."""
