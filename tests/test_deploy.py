"""The files of `deploy/`: they parse, and start a server by flags and with routes that it has."""

import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from polar.cli.main import app
from polar.serving import create_server

DEPLOY = Path(__file__).parents[1] / "deploy"
PORT = 30000


def instructions() -> dict[str, list[str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    found: dict[str, list[str]] = {}
    for line in filter(None, text.split("\n")):
        name, _, rest = line.partition(" ")
        found.setdefault(name, []).append(rest.strip())
    return found


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "polar.service").read_text())
    return parser


def manifests() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def command_lines() -> dict[str, list[str]]:
    entry, default = (json.loads(instructions()[name][0]) for name in ("ENTRYPOINT", "CMD"))
    container = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    service = shlex.split(unit()["Service"]["ExecStart"])
    return {
        "Dockerfile": [*entry, *default],
        "compose.yaml": [*entry, *compose()["polar"]["command"]],
        "kubernetes.yaml": [*entry, *container["args"]],
        "polar.service": ["polar", *service[1:]],
    }


@pytest.mark.parametrize("file", ["Dockerfile", "compose.yaml", "kubernetes.yaml", "polar.service"])
def test_the_command_has_flags_that_the_server_takes(file: str) -> None:
    name, *words = command_lines()[file]
    assert name == "polar"
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert bound.arguments["port"] == PORT
    assert bound.arguments["host"] == ("127.0.0.1" if file == "polar.service" else "0.0.0.0")


def test_routes_that_orchestrators_ask_need_no_key() -> None:
    container = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    asked = {container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    asked |= set(re.findall(rf"127\.0\.0\.1:{PORT}(/\w*)", instructions()["HEALTHCHECK"][0]))
    assert asked == {"/health", "/ready"}
    from starlette.testclient import TestClient

    with TestClient(create_server("polar-nano", keys=[b"secret"]).app) as client:
        assert {client.get(path).status_code for path in asked} == {200}
        (scrape,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
        assert client.get(scrape["metrics_path"]).status_code == 401
        key = {"Authorization": f"{scrape['authorization']['type']} secret"}
        assert "polar_ready" in client.get(scrape["metrics_path"], headers=key).text


def test_nothing_runs_as_root_and_all_wait_for_requests_in_flight() -> None:
    (number,) = instructions()["USER"]
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    assert int(number) == pod["securityContext"]["runAsUser"] > 0
    assert unit()["Service"]["DynamicUser"] == "yes"
    longest = 30  # the default of --drain-seconds
    assert pod["terminationGracePeriodSeconds"] > longest
    assert int(unit()["Service"]["TimeoutStopSec"]) > longest
    assert int(compose()["polar"]["stop_grace_period"].removesuffix("s")) > longest


def test_ports_of_the_composition_are_for_this_machine_alone() -> None:
    ports = [port for service in compose().values() for port in service["ports"]]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert manifests()["Service"]["spec"]["ports"][0]["port"] == PORT
