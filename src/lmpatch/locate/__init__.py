"""What locate-then-edit methods share: the value search, the covariance of keys, the solve, prefixes, neurons."""
