"""What ``fuzz.py`` runs: damaged files, hostile command lines, interrupts, threads and kills."""
