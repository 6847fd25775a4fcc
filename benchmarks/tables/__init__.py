"""What the pages print of the runs: from committed rows to Markdown, without torch."""
