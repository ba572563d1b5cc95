"""The run process: one run's actors on one node, from its start to its outcome.

Started by the supervisor through its zygote, but not its child in spirit: it outlives a supervisor
that crashes, and goes on until its run is over or a new supervisor refuses it.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import threading
from pathlib import Path

from voidbus.actors.artifact_store import ArtifactStore
from voidbus.actors.event import EventMaker
from voidbus.actors.fleet import VM_PATH
from voidbus.actors.kept_intents import KeptState
from voidbus.actors.leases import LeaseFile
from voidbus.actors.messages.run_process import RunConfig
from voidbus.actors.messages.runs import run_node
from voidbus.actors.run import RUN_PATH, SIDECAR_PATH, RunActor
from voidbus.actors.runtime.policy import ChildPolicy, Restart
from voidbus.actors.runtime.process import current_identity
from voidbus.actors.runtime.supervisor import ChildSpec, actor_child
from voidbus.actors.runtime.system import System
from voidbus.actors.runtime.thread_stacks import limit_thread_stacks
from voidbus.actors.sidecar import SidecarActor, SidecarDesk
from voidbus.actors.vm import VmActor
from voidbus.actors.workloads.conductor import MachineRequest
from voidbus.actors.workloads.make import machines_at_once, make_workload
from voidbus.spec.policy import Policy
from voidbus.spec.run import RunSpec
from voidbus.transport.leaf import Leaf
from voidbus.vm.descriptors import raise_descriptor_limit
from voidbus.vm.machine import ImageMount, MachineSpec, Mount
from voidbus.vm.select import select_machine

log = logging.getLogger("voidbus.run")

SPOOL_FILE = "spool.jsonl"
INTENTS_FILE = "intents.jsonl"
LEASE_FILE = "leases.jsonl"
LOG_FILE = "process.log"
MACHINE_FOLDER = "machine"
SHARES_FOLDER = "shares"
ENTRY = "voidbus.actors.run_process:run"
# What the zygote imports before it forks: every run process shares it, and none waits for it.
# Machines take 0.1 s to import, and 4 MB.
PRELOAD = (
    "voidbus.actors.run_process",
    "aiohttp.web",
    "voidbus.vm.kvm.machine",
    "voidbus.vm.kvm.support",
    "voidbus.vm.process.machine",
    "voidbus.vm.qemu.machine",
    "voidbus.vm.qemu.support",
)

STACK_BYTES = 1984 * 1024
"""Of each thread of a run's process, libzmq's too. Of glibc's 8 MiB one that lies well is a page of
2 MiB at once, where transparent huge pages are for everyone, as in Debian: such a stack is a
seventh of a run's process. In less than 2 MiB there is none; the deepest that pydantic writes takes
1.5 MiB (measured with Python 3.11)."""

_DEFAULT_GRACE = 30.0
_STOP_TIMEOUT = 10.0


def run(config_bytes: bytes) -> int:
    """Entry of a run process. Returns its exit status: 0 when its run came to any outcome."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    raise_descriptor_limit()
    limit_thread_stacks(STACK_BYTES)
    config = RunConfig.model_validate_json(config_bytes)
    # What others log stays as it is: it would be most of it.
    logging.getLogger("voidbus").setLevel(config.log_level)
    process = RunProcess(config)
    try:
        process.start()
        process.wait()
    finally:
        process.close()
    return 0


class RunProcess:
    """Node, system and actors of one run. Also used by tests, in a process of theirs."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._spec = RunSpec.model_validate_json(config.spec)
        self._policy = Policy.model_validate(config.policy) if config.policy is not None else None
        self._directory = Path(config.directory)
        self._over = threading.Event()
        self._leases = LeaseFile(self._directory / LEASE_FILE)
        self._run: RunActor | None = None
        self._leaf = Leaf(
            run_node(config.run_id),
            config.hub,
            token=config.token,
            generation=config.generation,
            start_time=current_identity().start_time,
            on_link=self._link_changed,
            on_refused=self._refused,
        )
        self._system = System(self._leaf)

    def start(self) -> None:
        """Start the run actor, and with it everything else."""
        config = self._config
        desk = self._desk()
        self._run = self._system.start(
            RunActor,
            RUN_PATH,
            self._children(desk),
            events=EventMaker(config.run_id, self._spec.sandbox.mode, config.next_seq),
            spool=self._directory / SPOOL_FILE,
            journal="supervisor/journal",
            run_generation=config.generation,
            make_vm=self._vm_child,
            make_workload=lambda conductor: make_workload(
                self._spec,
                conductor,
                run_id=config.run_id,
                host_env=os.environ,
                input_text=config.input,
                policy=self._policy,
                base=Path(config.spec_name).parent,
            ),
            machines_at_once=machines_at_once(self._policy),
            desk=desk,
            default_grace=(
                self._policy.cancel_grace_period_secs if self._policy else _DEFAULT_GRACE
            ),
            on_over=self._over.set,
        )
        self._run.link_changed(self._leaf.up)  # it may have come before there was a run to tell
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminated)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait(self) -> None:
        """Wait until the run is over."""
        # No deadline: a run lasts as long as it lasts; its stages have theirs.
        self._over.wait()

    def close(self) -> None:
        """Stop what is left and free everything."""
        if threading.current_thread() is threading.main_thread():
            # Its handler takes a lock that stopping takes too.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._system.stop(_STOP_TIMEOUT)
        self._leaf.close()
        self._leases.close()
        for left in (*self._directory.glob(f"{MACHINE_FOLDER}*"), self._directory / SHARES_FOLDER):
            shutil.rmtree(left, ignore_errors=True)

    def _desk(self) -> SidecarDesk | None:
        agent = self._spec.agent
        if agent is None or not agent.messaging.enabled:
            return None
        run_id = self._config.run_id
        kept = self._directory / INTENTS_FILE
        return SidecarDesk(KeptState(kept, execution_id=run_id, candidate_id=run_id))

    def _children(self, desk: SidecarDesk | None) -> tuple[ChildSpec, ...]:
        if desk is None:
            return ()
        return (
            actor_child(
                self._system,
                ChildPolicy(SIDECAR_PATH, Restart.TRANSIENT, stop_timeout=6.0),
                SidecarActor,
                desk,
                run_id=self._config.run_id,
                owner=RUN_PATH,
            ),
        )

    def _vm_child(self, path: str, request: MachineRequest) -> ChildSpec:
        """The VM actor of one machine. Raises OSError where there is no room for its files."""
        selection = select_machine(request.sandbox.mode)
        return actor_child(
            self._system,
            ChildPolicy(path, Restart.TEMPORARY, stop_timeout=8.0),
            VmActor,
            selection.machine,
            self._machine_spec(path, request),
            owner=RUN_PATH,
            telemetry="supervisor/telemetry",
            leases=self._leases,
            directory=self._directory,
            reason=selection.reason,
            artifacts=ArtifactStore(Path(self._config.artifacts)),
            stage=request.stage,
            model=request.model,
        )

    def _machine_spec(self, path: str, request: MachineRequest) -> MachineSpec:
        sandbox = request.sandbox
        # Sockets lie in it, whose paths may be 107 bytes long: no longer name than needed.
        scratch = self._directory / path.replace(VM_PATH, MACHINE_FOLDER, 1)
        scratch.mkdir(mode=0o700, exist_ok=True)
        self._leases.path(scratch)
        mounts = [
            Mount(Path(mount.host).absolute(), mount.guest, mount.writable)
            for mount in sandbox.mounts
        ]
        mounts += [
            Mount(self._share(share.name), share.guest, share.writable) for share in request.shares
        ]
        return MachineSpec(
            run_id=self._config.run_id,
            name=request.stage or self._spec.name,
            memory_mb=sandbox.memory_mb,
            vcpus=sandbox.vcpus,
            network=sandbox.network,
            scratch=scratch,
            secret=secrets.token_bytes(32),
            mounts=tuple(mounts),
            kernel=None if sandbox.kernel is None else Path(sandbox.kernel),
            initramfs=None if sandbox.initramfs is None else Path(sandbox.initramfs),
            root=sandbox.image,
            host_ports=frozenset(sandbox.host_ports),
            agent=request.agent,
            images=tuple(ImageMount(*image) for image in request.images),
            kernel_vsock=self._config.machines.kernel_vsock,
            virtiofsd=self._config.machines.virtiofsd,
        )

    def _share(self, name: str) -> Path:
        """A directory that machines of this run share; it is made before the first of them."""
        folder = self._directory / SHARES_FOLDER
        if not folder.exists():
            folder.mkdir(mode=0o700)
            self._leases.path(folder)
        share = folder / name
        share.mkdir(mode=0o700, exist_ok=True)
        return share

    def _link_changed(self, up: bool) -> None:
        run = self._run
        if run is not None:
            run.link_changed(up)

    def _refused(self, detail: str) -> None:
        run = self._run
        if run is not None:
            run.post(lambda: run.abandon(detail))
        else:
            self._over.set()

    def _terminated(self, *_: object) -> None:
        run = self._run
        if run is not None:
            run.post(lambda: run.cancel("the run process was terminated", None))
