"""The contracts: what holds for every decoupled model."""
