"""From a question to an entry: sentence encoders, an exact index of keys, and the network that RECIPE trains."""
