"""Changes of weights, by parameter name."""
