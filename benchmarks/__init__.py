"""One script per claim in the README; each prints a table and, last, one JSON line."""
