"""Facts that are looked up for each question and put before it."""
