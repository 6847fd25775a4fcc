"""Changes to a model as values: what they hold, how they go on and come off, how they are kept in files."""
