"""A worker process of a search: `python -m moec.compiler.search.worker`.

It reads the subject as one line of JSON, then one task per line, and answers each task with one line. It ends at the
end of its standard input, so no worker survives the process that started it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict

from moec.compiler.common.errors import MoecError, first_line
from moec.compiler.search.evaluation import Evaluator, Subject


def main() -> None:
    """Entry point of the process."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    subject = sys.stdin.readline()
    evaluator: Evaluator | None = None
    for line in sys.stdin:
        try:
            if evaluator is None:
                evaluator = Evaluator(Subject(**json.loads(subject)))
                evaluator.use_codes()
            answer = asdict(evaluator.evaluate(**json.loads(line)))
        except MoecError as error:
            answer = {"error": error.message}
        except Exception as error:  # noqa: BLE001 - a fault that nobody foresaw is told to the driver
            answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
