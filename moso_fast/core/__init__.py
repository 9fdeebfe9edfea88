"""A scoring problem and what it takes to solve it, whatever the backend: no file, no model."""
