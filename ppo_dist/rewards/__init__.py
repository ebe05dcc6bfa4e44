"""Judges of responses, one file per kind."""
