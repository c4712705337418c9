"""Operators on packed weights: one schema, one reference, and whichever faster backends can run here."""
