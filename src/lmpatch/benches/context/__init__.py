"""What ``memotrap`` and ``kre`` share: wordings of a question with a context, how it is answered, and the numbers."""
