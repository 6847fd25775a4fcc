"""What every bench shares: one runner, one store, one mean with its errors, one report."""
