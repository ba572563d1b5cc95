"""The skill an agent is given when messaging is on: how to talk to its peers."""

MESSAGING_SKILL_NAME = "void-messaging"

MESSAGING_SKILL = """\
---
name: void-messaging
description: Read messages from peer agents, send observations and recommendations.
---

# Messaging

You work beside other agents on the same task. The `void-message` command connects you.

- `void-message context` prints who you are and which iteration this is.
- `void-message inbox` prints what peers sent; `--since N` only what is newer than version N.
- `void-message send --kind signal --audience broadcast --summary TEXT` tells every peer something
  you observed.
- `void-message send --kind proposal --audience leader --summary TEXT` recommends a solution to the
  leader; `--kind evaluation` judges one.
- `--priority high|normal|low` says how urgent it is.

Read your inbox before you start and before you finish. Send at most three messages an iteration.
Keep a message under 4096 bytes.
"""
