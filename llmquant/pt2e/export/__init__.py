"""Converted programs as files of other runtimes."""
