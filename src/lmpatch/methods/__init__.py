"""One file per method. A leading underscore marks what several share."""
