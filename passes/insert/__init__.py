"""Insert: an interface on every boundary."""
