"""A tour in the browser."""
