"""Where workers run: the only package that knows Ray actors."""
