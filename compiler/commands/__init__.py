"""The commands of `moec`, a file per group. Like `moec.cli`, they import what is heavy when they run."""
