"""The experiments: one question, one file. Used from a checkout."""
