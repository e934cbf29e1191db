"""The spine: checkpoint in, Program through passes and a target, artifact and verdicts out."""
