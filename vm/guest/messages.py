"""What the actors take of the protocol's messages; each subject has a file of its own."""

from .telemetry_messages import TelemetryBatch as TelemetryBatch
