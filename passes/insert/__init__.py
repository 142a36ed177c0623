"""Insert: what stands on a boundary."""
