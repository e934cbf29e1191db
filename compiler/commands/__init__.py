"""The commands of `moec`, one file per group. Like `moec.cli`, they import heavy modules only when they run."""
