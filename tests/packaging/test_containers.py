"""Dockerfile and compose.yaml name settings, stages and options that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
settings = pytest.importorskip("hart_infer.server.settings", reason="the extra serve is not installed")
ROOT = Path(__file__).resolve().parents[2]
FILES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("Dockerfile", "compose.yaml", "docs/serving.md")}


@pytest.mark.parametrize("name", FILES)
def test_settings_by_the_environment_exist(name: str) -> None:
    named = re.findall(rf"\b{settings.PREFIX}([A-Z_]+)", FILES[name])
    assert named
    assert {each.lower() for each in named} <= set(settings.ServerSettings.model_fields)


def test_the_services_are_built_from_stages_and_are_closed() -> None:
    services = yaml.safe_load(FILES["compose.yaml"])["services"]
    stages = re.findall(r"^FROM \S+ AS (\w+)$", FILES["Dockerfile"], re.MULTILINE)
    for service in services.values():
        assert service["build"]["target"] in stages
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert settings.PREFIX + "KEYS" in service["environment"]
        assert int(service["stop_grace_period"].removesuffix("s")) > settings.ServerSettings().drain + 10


def test_no_stage_runs_as_root() -> None:
    last = dict(re.findall(r"^FROM base AS (\w+)$(.*?)(?=^FROM|\Z)", FILES["Dockerfile"], re.MULTILINE | re.DOTALL))
    assert set(last) == {"cpu", "cuda"}
    assert all("USER 10001" in text for text in last.values())
