"""One small function per op, grouped by kind of op; `TABLE` in table.py joins them all."""
