"""The run specification and the supervisor's configuration.

`loader` reads a run specification, `supervisor` the configuration; import the module you need.
"""
