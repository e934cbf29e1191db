"""Executor of CoreML ML programs in numpy: runs a saved .mlpackage where Core ML does not exist.

Each op is computed in fp32 (integers exactly) and its result rounded to the type that the program
declares, so an fp16 program rounds to fp16 after every op. It stands in for Core ML in the parity,
coverage and quality gates. It does not predict the speed on a device.
"""

from moec.targets.coreml.executor.counters import Cost, Counters
from moec.targets.coreml.executor.model import MilModel, MilSession, TensorDescriptor
from moec.targets.coreml.executor.state import State

__all__ = ["Cost", "Counters", "MilModel", "MilSession", "State", "TensorDescriptor"]
