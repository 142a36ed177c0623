"""The contracts that every decoupled model holds to."""
