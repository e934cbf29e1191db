"""One small function per op, grouped by theme. `TABLE` in table.py joins them all."""
