"""Starting a run's process: it gets what it needs in memory, and waits until it is journaled."""

from __future__ import annotations

import logging
from pathlib import Path

from voidbus.actors.admission import Admitted
from voidbus.actors.disk_remedy import disk_remedy
from voidbus.actors.messages.journal import ProcessRecord, RecordProcess
from voidbus.actors.messages.run_process import RunConfig
from voidbus.actors.run_process import ENTRY, LOG_FILE
from voidbus.actors.runtime.process import ProcessIdentity
from voidbus.actors.runtime.spawned import SpawnedProcess, SpawnError
from voidbus.actors.runtime.spawner import Spawner
from voidbus.spec.machines import MachinesConfig
from voidbus.transport.hub import Hub
from voidbus.transport.message import Right

log = logging.getLogger("voidbus.actors")

_ASK_TIMEOUT = 15.0
_SPAWN_TIMEOUT = 20.0


def spawn_run(
    spawner: Spawner,
    hub: Hub,
    admitted: Admitted,
    directory: Path,
    artifacts: Path,
    *,
    machines: MachinesConfig,
) -> SpawnedProcess:
    """A process for an admitted run. Blocks, on a job's thread. Raises what the spawner raises,
    SpawnError where the run can't have its directory, and BusError where the journal does not take
    it."""
    launch = admitted.launch
    config = RunConfig(
        run_id=launch.run_id,
        generation=admitted.generation,
        token=admitted.token,
        hub=hub.addresses[Right.WORK],
        directory=str(directory),
        artifacts=str(artifacts),
        spec=launch.spec_json,
        spec_name=launch.file,
        input=launch.input,
        policy=launch.policy,
        next_seq=len(launch.events),
        machines=machines,
        log_level=log.getEffectiveLevel(),
    )

    def record(identity: ProcessIdentity) -> None:
        """The process does nothing until this has returned."""
        process = ProcessRecord(
            generation=admitted.generation,
            token_digest=admitted.digest.hex(),
            pid=identity.pid,
            start_time=identity.start_time,
        )
        hub.ask(
            f"{hub.name}/journal",
            RecordProcess(run_id=launch.run_id, process=process),
            timeout=_ASK_TIMEOUT,
        ).result()

    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SpawnError(
            f"its directory {directory} can't be made: {error.strerror}; {disk_remedy(error)}"
        ) from error
    return spawner.spawn(
        ENTRY,
        config.model_dump_json().encode(),
        log_path=directory / LOG_FILE,
        title=f"voidbus-{launch.run_id}"[:15],
        record=record,
        timeout=_SPAWN_TIMEOUT,
    )
