"""Command line: parse, one call, print."""
