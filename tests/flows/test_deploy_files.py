"""deploy/: forms that help, one definition of the deployments, and a compose file whose parts exist."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prefect.automations import AutomationCore
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.settings.models.flows import FlowsSettings
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from flows import deployed
from flows.cli import app
from flows.config import resolve
from flows.forms import AuditForm, MeasureForm, StatesForm
from flows.serving import bootstrap, deployments, need_server, read_deployments
from storage.errors import UsageError
from tasks.gpu import GPU_LIMIT, VARIABLE, check_limit, gpu_slot, limit_for

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
NAMES = [entry["entrypoint"].partition(":")[2] for entry in read_deployments()]


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from schema["properties"].items()
    for name, definition in schema.get("definitions", {}).items():
        for field, spec in definition.get("properties", {}).items():
            yield f"{name}.{field}", spec


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_every_form_has_help(name: str) -> None:
    schema = parameter_schema(getattr(deployed, name)).model_dump()
    found = dict(fields(schema))
    assert len(found) >= 3
    assert [field for field, spec in found.items() if not spec.get("description")] == []


def test_choices_are_menus() -> None:
    found = dict(fields(parameter_schema(deployed.measure).model_dump()))
    assert set(found["MeasureForm.analyzers"]["items"]["enum"]) > {"loss", "spectra"}
    assert found["MeasureForm.dtype"]["anyOf"][0]["enum"] == ["float32", "bfloat16", "float64"]
    assert next(iter(parameter_schema(deployed.measure).definitions["MeasureForm"]["properties"])) == "series"


def test_the_deployments_of_the_issue_are_there_and_only_watch_is_scheduled() -> None:
    assert set(NAMES) == {"study", "measure", "states", "report", "audit", "watch"}
    for entry, made in zip(read_deployments(), deployments(), strict=True):
        assert made.name == entry["name"]
        assert [bool(s.active) for s in made.schedules or []] == [entry["name"] == "watch"]
        forms = parameter_schema(getattr(deployed, entry["entrypoint"].partition(":")[2])).definitions
        assert set(entry["parameters"]["form"]) <= set(next(iter(forms.values()))["properties"])


def test_a_form_says_what_the_command_line_says() -> None:
    form = MeasureForm(series="pythia-70m", steps="0..512", analyzers=["loss"], dtype="bfloat16", keep=True)
    said = {"steps": "0..512", "analyzers": ["loss"], "dtype": "bfloat16", "keep": True}
    assert form.config() == resolve("pythia-70m", {f"measure.{key}": value for key, value in said.items()})
    assert MeasureForm(series="pythia-70m").config() == resolve("pythia-70m")
    assert AuditForm(series="specimen", settings=["probe.length=32"]).config().probe.length == 32
    states = StatesForm(series="specimen", k_max=3, grid="own", root="nowhere").config().states
    assert (states.fit.k_max, states.grid) == (3, "own")


@pytest.mark.parametrize("wrong", [{"series": "x", "serie": "y"}, {"series": "x", "settings": ["length"]}])
def test_a_wrong_form_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AuditForm.model_validate(wrong)


def test_without_a_server_the_sentence_says_how_to_get_one() -> None:
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(UsageError, match="make server"),
    ):
        need_server()


def test_automations_are_valid_and_wait_for_two_signs_of_life() -> None:
    files = sorted((DEPLOY / "automations").glob("*.yaml"))
    assert [file.stem for file in files] == ["webhook", "zombies"]
    webhook, zombies = (AutomationCore.model_validate(yaml.safe_load(file.read_text())) for file in files)
    assert set(webhook.trigger.expect) == {"ontogeny.anomaly", "ontogeny.new-phase"}  # type: ignore[union-attr]
    default = FlowsSettings.model_fields["heartbeat_frequency"].default
    assert zombies.trigger.within.total_seconds() > 2 * default  # type: ignore[union-attr]


def test_the_gpu_limit_is_kept_where_it_is_named_and_missed_where_it_is_absent(
    prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert limit_for(gpu) is None
    monkeypatch.setenv(VARIABLE, "nobody-made-this")
    assert limit_for(cpu) is None
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        with pytest.raises(UsageError, match="nobody-made-this"):
            check_limit(gpu)
        with pytest.raises(Exception, match="nobody-made-this"), gpu_slot(gpu):
            pytest.fail("a slot of a limit that does not exist")
        bootstrap(gpus=1)
        bootstrap(gpus=3)  # a second call renews
        monkeypatch.setenv(VARIABLE, GPU_LIMIT)
        check_limit(gpu)
        with get_client(sync_client=True) as client:
            assert client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit == 3
            with gpu_slot(gpu), gpu_slot(cpu):
                assert client.read_global_concurrency_limit_by_name(GPU_LIMIT).active_slots == 1
            assert client.read_global_concurrency_limit_by_name(GPU_LIMIT).active_slots == 0


def words(service: dict[str, Any]) -> list[str]:
    return [str(word) for key in ("entrypoint", "command") for word in service.get(key) or []]


def test_compose_starts_things_in_order_and_binds_loopback() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"database", "server", "bootstrap", "worker", "store"}
    for name, service in services.items():
        assert "image" in service
        for other in service.get("depends_on", {}):
            assert other in services, name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), (name, port)
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"]
    assert services["store"]["profiles"] == ["s3"]
    assert services["worker"]["environment"]["ONTOGENY_GPU_LIMIT"] == GPU_LIMIT
    assert "prefect:${POSTGRES_PASSWORD}@database" in str(services["server"]["environment"])


def test_commands_and_files_of_the_image_exist() -> None:
    known = {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    said = " ".join(word for service in COMPOSE["services"].values() for word in words(service))
    assert set(re.findall(r"ontogeny (\w+)", said)) == {"bootstrap"} <= known
    assert all((DEPLOY.parent / path).is_file() for path in re.findall(r"deploy/[\w.]+", said))
    image = (DEPLOY / "Dockerfile").read_text()
    copied = {path for line in re.findall(r"^COPY (.*) \S+$", image, re.M) for path in line.split()}
    assert all((DEPLOY.parent / path).exists() for path in copied)
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= copied
    build = COMPOSE["services"]["worker"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()


def test_scripts_parse() -> None:
    bash = shutil.which("bash")
    assert bash
    assert subprocess.run([bash, "-n", DEPLOY / "server.sh"], check=False).returncode == 0
