"""Changes of weights, by parameter name."""

from .patch import WeightPatch

KIND = WeightPatch
