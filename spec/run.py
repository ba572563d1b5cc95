"""The run specification: what a run is made of, its defaults and the types of its fields.

Rules that span fields (exclusive settings, references, cycles) are in `rules`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from voidbus.spec.model import Items, SpecModel
from voidbus.spec.policy import U64_MAX
from voidbus.spec.skill import Skill

Kind = Literal["agent", "pipeline", "workflow", "sandbox"]

# Bounds of a machine: 16 MB to 16 GB, and the vCPUs an x86 guest may have.
MIN_MEMORY_MB, MAX_MEMORY_MB = 16, 16 * 1024
MIN_VCPUS, MAX_VCPUS = 1, 256

SANDBOX_MODES = ("auto", "mock", "local", "kvm", "qemu")
MOUNT_MODES = ("ro", "rw")
PROVIDERS = ("claude", "claude-personal", "ollama", "lm-studio", "custom", "codex")
DEFAULT_PROVIDER = "claude"


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _section(value: Any) -> Any:
    """A section with nothing in it (`sandbox:`) is a section of defaults."""
    return {} if value is None else value


MemoryMb = Annotated[int, Field(ge=MIN_MEMORY_MB, le=MAX_MEMORY_MB)]
Vcpus = Annotated[int, Field(ge=MIN_VCPUS, le=MAX_VCPUS)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[int, Field(ge=0, le=U64_MAX)]
LowerText = Annotated[str, BeforeValidator(_lower)]


class MountSpec(SpecModel):
    """A host directory in the guest. Only `mode: rw`, spelt exactly so, is writable."""

    host: str
    guest: str
    mode: str = "ro"

    @property
    def writable(self) -> bool:
        return self.mode == "rw"


class SandboxSpec(SpecModel):
    """The machine of a run. `memory_mb` is in mebibytes. `host_ports` are TCP ports of the host's
    127.0.0.1 that a guest with `network` may reach at 10.0.2.2. `guest_image: ""` turns pulling
    off."""

    mode: LowerText = "auto"
    kernel: str | None = None
    initramfs: str | None = None
    memory_mb: MemoryMb = 1024
    vcpus: Vcpus = 1
    network: bool = False
    env: Mapping[str, str] = Field(default_factory=dict)
    mounts: Items[MountSpec] = ()
    host_ports: Items[Port] = ()
    image: str | None = None
    guest_image: str | None = None
    snapshot: str | None = None


class PricesSpec(SpecModel):
    """What a model costs, in US dollars for a million tokens."""

    input: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    output: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class LlmSpec(SpecModel):
    """The model behind an agent. `api_key_env` names a variable of the host, never a key;
    `max_requests` is how often the agent may ask the model, `max_cost` what that may cost by
    `prices`, in US dollars."""

    provider: LowerText
    model: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    credential_proxy: bool | None = None
    key_in_guest: bool = False
    max_requests: Annotated[int, Field(ge=1, le=U64_MAX)] | None = None
    max_cost: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    prices: PricesSpec | None = None


class ObserveSpec(SpecModel):
    """Observability settings: accepted, and not consulted; the environment decides."""

    traces: bool = False
    metrics: bool = False
    logs: bool = False
    otlp_endpoint: str | None = None
    service_name: str | None = None
    telemetry_buffer_size: Annotated[int, Field(ge=0, le=U64_MAX)] | None = None


class MessagingSpec(SpecModel):
    """Whether the agent gets a sidecar, and which bridge of its provider to offer it through."""

    enabled: bool = False
    provider_bridge: str | None = None


class AgentCommand(SpecModel):
    """A program that is an agent. `{prompt}` in an argument stands for the prompt, which is else
    the program's standard input."""

    program: str
    args: Items[str] = ()


class AgentSpec(SpecModel):
    """One agent with a prompt. `timeout_secs` None means the host's default. `program` stands for
    the provider's own program, `command` for a program of no provider."""

    prompt: str
    program: str | None = None
    command: AgentCommand | None = None
    skills: Items[Skill] = ()
    timeout_secs: Seconds | None = None
    output_file: str | None = None
    messaging: MessagingSpec = MessagingSpec()
    mode: Literal["task", "service", "interactive"] = "task"


class BoxSandboxSpec(SpecModel):
    """What a box says about its machine; None and absent fields are the run's."""

    memory_mb: MemoryMb | None = None
    vcpus: Vcpus | None = None
    network: bool | None = None
    env: Mapping[str, str] = Field(default_factory=dict)
    mounts: Items[MountSpec] = ()
    snapshot: str | None = None


class OutputSpec(SpecModel):
    """A directory a box writes for others, known to them by `name`."""

    name: str
    guest: str = "/workspace/output"


class InputSpec(SpecModel):
    """Another box's output, by its name, to read from."""

    source: Annotated[str, Field(alias="from")]
    guest: str = "/workspace/input"


class BoxSpec(SpecModel):
    """One agent of a pipeline, in a machine of its own. `llm` None is the run's; `program` and
    `command` are as an AgentSpec's."""

    name: str
    prompt: str
    program: str | None = None
    command: AgentCommand | None = None
    skills: Items[Skill] = ()
    llm: LlmSpec | None = None
    timeout_secs: Seconds | None = None
    sandbox: BoxSandboxSpec | None = None
    outputs: Items[OutputSpec] = ()
    inputs: Items[InputSpec] = ()


class BoxStage(SpecModel):
    """A stage of one box."""

    type: Literal["box"]
    name: str


class FanOutStage(SpecModel):
    """A stage of several boxes side by side, given the same input."""

    type: Literal["fan_out"]
    boxes: Items[str]


Stage = Annotated[BoxStage | FanOutStage, Field(discriminator="type")]


class PipelineSpec(SpecModel):
    """Boxes run in stages. No stages: each box is one, in the order declared."""

    boxes: Items[BoxSpec]
    stages: Items[Stage] = ()


class StepRun(SpecModel):
    """A program and where its stdin comes from: `stdin_from` names a step; None means the first
    of `depends_on`."""

    program: str
    args: Items[str] = ()
    stdin_from: str | None = None


class StepSpec(SpecModel):
    """One step of a workflow. `mode: service` has no timeout."""

    name: str
    run: StepRun
    depends_on: Items[str] = ()
    mode: Literal["service"] | None = None
    timeout_secs: Seconds | None = None


class WorkflowSpec(SpecModel):
    """Programs run in one machine, ordered by what they depend on."""

    steps: Items[StepSpec]
    output_step: str | None = None


class RunSpec(SpecModel):
    """A run. Which of `agent`, `pipeline` and `workflow` there is follows from `kind`."""

    api_version: str = "v1"
    kind: Kind
    name: str
    sandbox: Annotated[SandboxSpec, BeforeValidator(_section)] = SandboxSpec()
    llm: LlmSpec | None = None
    observe: ObserveSpec | None = None
    agent: AgentSpec | None = None
    pipeline: PipelineSpec | None = None
    workflow: WorkflowSpec | None = None
