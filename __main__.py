"""`python -m moec` is the command `moec`."""

from moec.cli import main

main()
