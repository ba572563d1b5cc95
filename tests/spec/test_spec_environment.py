"""The environment's part in a run."""

from __future__ import annotations

import pytest

from voidbus.spec.environment import resolve_env, with_llm_overrides
from voidbus.spec.problem import SpecError
from voidbus.spec.run import LlmSpec, RunSpec

SPEC = RunSpec(kind="sandbox", name="n")


def test_an_empty_value_is_taken_from_the_host() -> None:
    env = {"A": "", "B": "", "C": "c", "OLLAMA_BASE_URL": "spec"}
    host = {"A": "a", "C": "host", "OLLAMA_BASE_URL": "host", "OTHER": "x"}
    assert resolve_env(env, host) == {"A": "a", "B": "", "C": "c", "OLLAMA_BASE_URL": "host"}
    assert resolve_env({"OLLAMA_BASE_URL": "spec"}, {}) == {"OLLAMA_BASE_URL": "spec"}


def test_an_override_makes_or_changes_the_llm() -> None:
    assert with_llm_overrides(SPEC, {"VOIDBOX_LLM_MODEL": ""}) is SPEC
    made = with_llm_overrides(SPEC, {"VOIDBOX_LLM_MODEL": "m"})
    assert made.llm == LlmSpec(provider="claude", model="m")
    changed = with_llm_overrides(
        made,
        {
            "VOIDBOX_LLM_PROVIDER": "Ollama",
            "VOIDBOX_LLM_BASE_URL": "u",
            "VOIDBOX_LLM_API_KEY_ENV": "K",
        },
    )
    assert changed.llm == LlmSpec(provider="ollama", model="m", base_url="u", api_key_env="K")


def test_an_unknown_provider_names_the_variable() -> None:
    with pytest.raises(SpecError, match=r"environment variable VOIDBOX_LLM_PROVIDER: .*'claude'"):
        with_llm_overrides(SPEC, {"VOIDBOX_LLM_PROVIDER": "claud"})
