"""The dashboard and the alerts use metrics that exist."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.local.servers.embedded import free_port
from shared.settings import Settings
from tests.integration.flow import open_flow
from tests.integration.gateway_fixtures import eventually, running_gateway

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


async def test_every_metric_that_is_queried_is_exported(settings: Settings) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "heartmula.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {
        name for expr in [*asked, *(rule["expr"] for rule in rules())] for name in re.findall(r"heartmula_\w+", expr)
    }
    async with running_gateway(settings, settings.data_dir) as gateway, open_flow(settings) as flow:
        flow.settings = replace(settings, metrics_port=(port := free_port()))
        await flow.worker("tokenizer")
        flow.settings = settings
        await flow.worker("codec")
        job_id = await gateway.submit()
        await flow.ended(job_id)
        await gateway.http.get("/nothing")

        async def all_there() -> bool:
            async with httpx.AsyncClient(trust_env=False) as http:
                urls = (f"{gateway.base}/metrics", f"http://127.0.0.1:{port}/metrics")
                exported = "\n".join([(await http.get(url)).text for url in urls])
            return names <= set(re.findall(r"^(?:# TYPE )?(heartmula_\w+)", exported, re.MULTILINE))

        await eventually(all_there, "metrics that are not exported")


def test_every_alert_has_a_severity_and_a_summary() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        assert f"`{rule['alert']}`" in text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is missing")
def test_the_rules_are_valid() -> None:
    run = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
