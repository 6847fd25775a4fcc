"""What ``parenting.py`` compares fairly with: as many tries for every method, and a control tuned on form alone."""
