"""The bus: typed messages between nodes over ZeroMQ. Knows no actor and no machine.

`address`, `message`, `envelope` say what is sent; `delivery` and `topics` keep the promises of
docs/messages.md; `node` is the interface, `hub` and `leaf` its two ends; `access` is who may.
"""
