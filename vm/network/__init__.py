"""The user-mode network of a machine, and what may pass through it."""
