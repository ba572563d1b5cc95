"""The HTTP API: requests become bus messages, answers become JSON."""
