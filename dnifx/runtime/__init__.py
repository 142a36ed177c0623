"""What runs: the interface nodes, the decoupled module and its trainer."""
