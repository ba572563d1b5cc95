"""A killed run process: how long until its death is seen, and until its run has failed.

Targets: seen within 20 ms and `run.failed` published within 100 ms (which is after it is
journaled), both p50; p99 stands beside them.
Peers, with their default settings: circus (it looks every `check_delay`, 5 s), until it tells of
the death of a watcher's process and until it has started another; xoscar (its pool looks every
0.5 s), until a call to an actor in a killed process of the pool fails, and until the pool has
noticed by itself.
Theirs are printed as multiples of ours too: of the p50 until a death is seen.
How: SIGKILL, one run after another, with the others idle beside it. "Seen" is measured on the
supervisor's own `Spawner` in this process: from the kill to its `on_exit` call. "Failed" is
measured from outside, on a whole supervisor: from the kill to the publication's arrival here.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from queue import SimpleQueue

import zmq
from kit.measure import Report, import_from_bench, installed, percentile, start_report
from kit.supervised import PATIENCE, Supervised, children, command_line, kill

from voidbus.actors.runtime.process import ProcessIdentity
from voidbus.actors.runtime.spawner import Spawner

SLEEPER = "kit.sleeper:run"


def seen(kills: int, *, use_zygote: bool) -> list[float]:
    """Milliseconds from SIGKILL to the spawner's word of it."""
    ends: SimpleQueue[tuple[ProcessIdentity, float]] = SimpleQueue()
    import_from_bench()
    spawner = Spawner(
        on_exit=lambda identity, _: ends.put((identity, time.monotonic())),
        preload=("kit.sleeper",),
        use_zygote=use_zygote,
    )
    found = []
    try:
        for _ in range(kills):
            spawned = spawner.spawn(SLEEPER, b"", timeout=PATIENCE)
            with spawned.handle:
                moment = kill(spawned.identity.pid)
                identity, ended = ends.get(timeout=PATIENCE)
                if identity != spawned.identity:
                    raise RuntimeError(f"another process ended: {identity}")
                found.append((ended - moment) * 1000)
    finally:
        spawner.close()
    return found


def failed(kills: int) -> list[float]:
    """Milliseconds from SIGKILL to the publication of `run.failed`."""
    with Supervised() as supervised:
        runs = supervised.start_ready(kills)
        found = []
        for run_id in runs:
            moment = kill(supervised.run_process(run_id))
            found.append((supervised.events.wait(run_id, "run.failed") - moment) * 1000)
    return found


# -- circus --------------------------------------------------------------------------------

CIRCUS = """
[circus]
endpoint = tcp://127.0.0.1:{0}
pubsub_endpoint = tcp://127.0.0.1:{1}
statsd = False
[watcher:sleeper]
cmd = {2} -c "import signal; signal.pause()"
numprocesses = 1
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


def circus(kills: int) -> tuple[list[float], list[float]]:
    """Milliseconds from SIGKILL to circus's `reap`, and to its `spawn` of the next."""
    reaped, spawned = [], []
    ports = [free_port(), free_port()]
    with tempfile.TemporaryDirectory(prefix="vb-") as folder, zmq.Context() as context:
        config = Path(folder) / "circus.ini"
        config.write_text(CIRCUS.format(*ports, sys.executable))
        with context.socket(zmq.SUB) as events:
            events.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
            events.setsockopt(zmq.LINGER, 0)
            events.setsockopt(zmq.SUBSCRIBE, b"watcher.sleeper.")
            events.connect(f"tcp://127.0.0.1:{ports[1]}")
            with Path(folder, "log").open("wb") as log:
                arbiter = subprocess.Popen(
                    [sys.executable, "-m", "circus.circusd", str(config)], stdout=log, stderr=log
                )
            try:
                pid = first_child(arbiter.pid)
                time.sleep(1.0)  # its publisher knows of our subscription by then
                for _ in range(kills):
                    moment = kill(pid)
                    circus_event(events, b"reap")
                    reaped.append((time.monotonic() - moment) * 1000)
                    pid = circus_event(events, b"spawn")
                    spawned.append((time.monotonic() - moment) * 1000)
            finally:
                end_circus(arbiter)
    return reaped, spawned


def end_circus(arbiter: subprocess.Popen[bytes]) -> None:
    """Politely, else by force; circusd does not always end while it starts a process."""
    watched = children(arbiter.pid)
    arbiter.terminate()
    try:
        arbiter.wait(10.0)
    except subprocess.TimeoutExpired:
        arbiter.kill()
        arbiter.wait(PATIENCE)
        for pid in watched:
            kill(pid)


def first_child(parent: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for pid in children(parent):
            if b"signal.pause()" in command_line(pid):
                return pid
        time.sleep(0.05)
    raise TimeoutError("circus started nothing")


def circus_event(events: zmq.Socket[bytes], kind: bytes) -> int:
    """Wait for an event; the pid it is about."""
    while True:
        topic, body = events.recv_multipart()
        if topic.endswith(b"." + kind):
            return int(json.loads(body)["process_pid"])


# -- xoscar --------------------------------------------------------------------------------


def xoscar(kills: int) -> tuple[list[float], list[float]]:
    """Milliseconds from SIGKILL to a failing call, and to the pool's own callback."""
    import xoscar as xo
    from peers.xoscar_echo import EchoActor

    import_from_bench()

    async def one() -> tuple[float, float]:
        noticed = asyncio.Event()

        def down(_pool: object, _address: str) -> None:
            noticed.set()

        pool = await xo.create_actor_pool(
            "127.0.0.1", n_process=1, auto_recover=False, on_process_down=down
        )
        try:
            actor = await xo.create_actor(
                EchoActor,
                address=pool.external_address,
                allocate_strategy=xo.allocate_strategy.ProcessIndex(1),
            )
            await actor.echo("warm")
            moment = kill(next(iter(pool.sub_processes.values())).pid)
            try:
                async with asyncio.timeout(15.0):
                    while True:
                        await actor.echo("still there?")
            except TimeoutError:
                raise
            except Exception:
                failing = (time.monotonic() - moment) * 1000
            async with asyncio.timeout(15.0):
                await noticed.wait()
            return failing, (time.monotonic() - moment) * 1000
        finally:
            await pool.stop()

    async def run() -> list[tuple[float, float]]:
        return [await one() for _ in range(kills)]

    found = asyncio.run(run())
    return [each[0] for each in found], [each[1] for each in found]


# ------------------------------------------------------------------------------------------


def show(report: Report, what: str, times: list[float]) -> None:
    report.figure(f"{what}, p50", percentile(times, 0.5), "ms")
    report.figure(f"{what}, p99 of {len(times)}", percentile(times, 0.99), "ms")


def against(report: Report, what: str, times: list[float], ours: float) -> None:
    report.figure(f"{what} to our death seen, p50: ratio", percentile(times, 0.5) / ours)


def main() -> None:
    report, options = start_report(__file__, __doc__)
    kills, peer_kills = (3, 1) if options.quick else (40, 5)
    ours = seen(kills, use_zygote=True)
    executed = seen(3 if options.quick else 10, use_zygote=False)
    ended = failed(kills)
    show(report, "voidbus: death seen", ours)
    show(report, "voidbus: death seen, executed without the zygote", executed)
    show(report, "voidbus: run.failed published", ended)
    typical = percentile(ours, 0.5)
    if installed("circus"):
        reaped, spawned = circus(peer_kills)
        show(report, "circus: death told", reaped)
        show(report, "circus: next one started", spawned)
        against(report, "circus's death told", reaped, typical)
    else:
        report.leave_out("circus")
    if installed("xoscar"):
        failing, noticed = xoscar(min(peer_kills, 3))
        show(report, "xoscar: a call fails", failing)
        show(report, "xoscar: the pool has noticed", noticed)
        against(report, "xoscar's failing call", failing, typical)
        against(report, "xoscar's pool having noticed", noticed, typical)
    else:
        report.leave_out("xoscar")
    report.at_most("death seen, p50, ms", typical, 20.0)
    report.at_most("run.failed published, p50, ms", percentile(ended, 0.5), 100.0)
    report.write(options.results)


if __name__ == "__main__":
    main()
