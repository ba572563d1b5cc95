"""What the host's environment says about a run. Pure: the environment is an argument."""

from __future__ import annotations

from collections.abc import Mapping

from voidbus.spec.problem import Position, Problem, SpecError, nearest
from voidbus.spec.run import DEFAULT_PROVIDER, PROVIDERS, LlmSpec, RunSpec

# Where the local Ollama listens differs from host to host, so the host's word stands over the
# specification's.
_HOST_WINS = frozenset({"OLLAMA_BASE_URL"})

LLM_OVERRIDES = {
    "VOIDBOX_LLM_PROVIDER": "provider",
    "VOIDBOX_LLM_MODEL": "model",
    "VOIDBOX_LLM_BASE_URL": "base_url",
    "VOIDBOX_LLM_API_KEY_ENV": "api_key_env",
}


def resolve_env(env: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """The guest's variables: an empty value is taken from the host (empty there too if the host
    hasn't got it). A kind `sandbox` run passes its values on unresolved and doesn't call this."""
    resolved: dict[str, str] = {}
    for name, value in env.items():
        host = environ.get(name, "")
        resolved[name] = host if not value or (host and name in _HOST_WINS) else value
    return resolved


def with_llm_overrides(spec: RunSpec, environ: Mapping[str, str]) -> RunSpec:
    """`spec` with the run's `llm` replaced field by field from VOIDBOX_LLM_*; an empty variable
    counts as unset. The llm of a pipeline's box is its own and stays.

    Raises SpecError, naming the variable, for a provider that isn't known.
    """
    fields = {
        field: environ[variable]
        for variable, field in LLM_OVERRIDES.items()
        if environ.get(variable)
    }
    if not fields:
        return spec
    if "provider" in fields:
        fields["provider"] = fields["provider"].lower()
        _check_provider(fields["provider"])
    llm = spec.llm or LlmSpec(provider=DEFAULT_PROVIDER)
    return spec.model_copy(update={"llm": llm.model_copy(update=fields)})


def _check_provider(provider: str) -> None:
    if provider in PROVIDERS:
        return
    raise SpecError(
        [
            Problem(
                Position("environment variable VOIDBOX_LLM_PROVIDER"),
                "llm.provider",
                "unknown provider",
                found=f"'{provider[:60]}'",
                allowed=", ".join(PROVIDERS),
                suggestion=nearest(provider, PROVIDERS),
            )
        ]
    )
