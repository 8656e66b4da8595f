"""Alert rules, by Prometheus' own tool; and what they and the dashboard read is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml

from feature_repo.settings import CHECKOUT
from serving.api.degraded import Degraded
from serving.api.metrics import Metrics
from tests.conftest import missing

FOLDER = CHECKOUT / "deploy" / "prometheus"
SERIES = re.compile(r"memoir_\w+")


@pytest.mark.parametrize(
    "words", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")]
)
def test_promtool_takes_the_rules(words: tuple[str, ...]) -> None:
    if shutil.which("promtool") is None:
        missing("promtool")
    done = subprocess.run(
        ["promtool", *words], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def known_series() -> set[str]:
    """All series of a server that has answered nothing yet."""
    metrics = Metrics(1.0)
    metrics.prepare(["/v1/rank"], Degraded)
    return set(SERIES.findall(metrics.text().decode()))


def test_rules_and_dashboard_read_series_that_there_are() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
    dashboard = json.loads((CHECKOUT / "deploy" / "grafana" / "memoir.json").read_text())
    asked = {rule["alert"]: rule["expr"] for rule in rules}
    asked |= {
        panel["title"]: target["expr"]
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }
    known = known_series()
    for name, expression in asked.items():
        assert set(SERIES.findall(expression)) <= known, name
    reasons = {str(reason) for reason in Degraded}
    for expression in asked.values():
        for found in re.findall(r'reason=~?"([^"]+)"', expression):
            assert set(found.split("|")) <= reasons


def test_every_alert_stands_on_the_page() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
    page = (CHECKOUT / "docs" / "production.md").read_text()
    for rule in rules:
        assert f"`{rule['alert']}`" in page, rule["alert"]
