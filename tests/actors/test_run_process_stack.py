"""Threads of a run's process have less stack than usual: it is enough for the deepest there is."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from voidbus.actors.run_process import STACK_BYTES

HUGE_PAGE = 2 * 1024 * 1024

DEEPEST = """
import json, sys, threading
from typing import Any
from voidbus.actors.runtime.thread_stacks import limit_thread_stacks
from voidbus.transport.message import CodecError, Message

class Chain(Message, tag="test.chain"):
    payload: dict[str, Any] = {}
    below: "Chain | None" = None

class Nested:
    def __init__(self, below): self.below = below
    def __repr__(self): return repr(self.below)

def tried(call):
    try:
        call()
    except (RecursionError, ValueError, CodecError):
        pass

def deepest():
    chain = nested = None
    for _ in range(3000):
        chain, nested = Chain.model_construct(payload={"a": [1]}, below=chain), Nested(nested)
    lists = []
    for _ in range(3000):
        lists = [{"a": lists}]
    listed = Chain.model_construct(payload={"a": lists})
    for call in (
        chain.to_json, listed.to_json, chain.model_dump, listed.model_dump,
        lambda: repr(nested), lambda: repr(chain), lambda: repr(listed), lambda: json.dumps(lists),
        lambda: json.loads("[" * 100_000), lambda: Chain.from_json(b'{"below":' * 5000),
        lambda: Chain.from_json(b'{"payload":{"a":' + b"[" * 100_000),
    ):
        tried(call)
    print("there")

limit_thread_stacks(int(sys.argv[1]))
thread = threading.Thread(target=deepest)
thread.start()
thread.join()
"""

LIBRARY = """
import re, sys
from pathlib import Path
import zmq
from voidbus.actors.runtime.thread_stacks import limit_thread_stacks

def largest():
    '''Of the mappings that came with a context: they are its threads' stacks.'''
    before = set(Path("/proc/self/maps").read_text().splitlines())
    with zmq.Context() as context, context.socket(zmq.PAIR):
        new = set(Path("/proc/self/maps").read_text().splitlines()) - before
    ranges = [line.split()[0].split("-") for line in new if " rw-p " in line]
    return max(int(end, 16) - int(start, 16) for start, end in ranges)

usual = largest()
limit_thread_stacks(int(sys.argv[1]))
print(usual > int(sys.argv[1]) >= largest())
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, str(STACK_BYTES)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_stack_holds_the_deepest_recursion_that_python_and_pydantic_allow() -> None:
    ended = run(DEEPEST)
    assert (ended.stdout, ended.returncode) == ("there\n", 0), ended.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others have no default to set")
def test_threads_of_libraries_have_no_more_stack() -> None:
    ended = run(LIBRARY)
    assert (ended.stdout, ended.returncode) == ("True\n", 0), ended.stdout + ended.stderr


def test_no_stack_has_room_for_a_huge_page() -> None:
    assert STACK_BYTES < HUGE_PAGE
