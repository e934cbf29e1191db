"""Run `moec validate ... --json`, and write exit code, seconds, CPU seconds and peak memory of the process to a file.

python measure_validate.py FILE [ARGUMENT...]
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from moec import cli

started = time.perf_counter()
code = cli.dispatch(["validate", *sys.argv[2:], "--json", "-q"])
used = resource.getrusage(resource.RUSAGE_SELF)
status = Path("/proc/self/status").read_text()
peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024
figures = {
    "exit_code": code,
    "seconds": time.perf_counter() - started,
    "cpu": used.ru_utime + used.ru_stime,
    "peak": peak,
}
Path(sys.argv[1]).write_text(json.dumps(figures))
