"""docs/scaling.md: the plan's arithmetic; deploy/kubernetes: templates that are whole and consistent."""

import json
import re
import runpy
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Olmo2Config, Olmo2ForCausalLM

from tasks.job import SCRATCH

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
PLACE = re.compile(r"\{\{ (\w+) \}\}")


@pytest.fixture(scope="module")
def plan() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "scaling_plan.py"), run_name="plan"))


def test_the_page_has_the_plan_as_it_is_computed(plan: SimpleNamespace) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert plan.page(text) == text


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_are_those_of_the_real_classes(plan: SimpleNamespace) -> None:
    import torch

    with torch.device("meta"):
        for model in plan.POLYPYTHIAS:
            config = GPTNeoXConfig(
                vocab_size=model.vocabulary,
                hidden_size=model.width,
                num_hidden_layers=model.layers,
                num_attention_heads=8,
                intermediate_size=4 * model.width,
            )
            assert parameters(GPTNeoXForCausalLM(config)) == model.parameters, model.name
        olmo = plan.OLMO
        config = Olmo2Config(
            vocab_size=olmo.vocabulary,
            hidden_size=olmo.width,
            num_hidden_layers=olmo.layers,
            num_attention_heads=32,
            intermediate_size=olmo.gated,
        )
        assert parameters(Olmo2ForCausalLM(config)) == olmo.parameters


@pytest.mark.parametrize(("name", "gigabytes"), [("70m", 22), ("160m", 50), ("410m", 125)])
def test_sizes_of_one_run_are_the_known_ones(plan: SimpleNamespace, name: str, gigabytes: int) -> None:
    (model,) = (m for m in plan.POLYPYTHIAS if m.name == f"pythia-{name}")
    assert round(model.bytes / model.runs / 1e9) == gigabytes


def test_fifty_runs_of_154(plan: SimpleNamespace) -> None:
    assert sum(m.runs for m in plan.POLYPYTHIAS) == 50
    assert {m.checkpoints for m in plan.POLYPYTHIAS} == {154}


def test_times_by_hand(plan: SimpleNamespace) -> None:
    a = plan.Assumptions()
    model = plan.Model("by hand", layers=2, width=10, vocabulary=100, runs=3, checkpoints=4, stored=2)
    assert model.parameters == 2 * 1000 + 2 * (1200 + 130) + 20
    assert model.bytes == 12 * 2 * 4680
    assert model.gpu_seconds(a) == pytest.approx(2 * 4680 * 131072 * 12 * 1.25 / (0.3 * 67e12))
    # 16 spectra and 12 matrices of width 10; per block four 10 x 10 and two 40 x 10.
    assert model.core_flop() == pytest.approx(4 / 3 * 1000 * (16 + 12) + 2 * (4 * 1000 + 2 * 4000))
    assert model.cpu_seconds(a) == pytest.approx(model.core_flop() * 12 / 80e9)
    assert model.line_seconds(a) == pytest.approx(12 * 6 / 10)  # its bytes take a millisecond
    assert model.table_bytes() == 12 * 4 * 4 * 10 * 8
    assert plan.limit(model, a) == ("download", model.line_seconds(a))
    assert model.alone_seconds(a) == model.line_seconds(a)


def test_the_sentences_say_what_the_tables_say(plan: SimpleNamespace) -> None:
    a = plan.Assumptions()
    assert [plan.limit(m, a)[0] for m in plan.POLYPYTHIAS] == 4 * ["download"] + ["processor"]
    assert sum(m.bytes for m in plan.POLYPYTHIAS) / 1e12 == pytest.approx(2.1, abs=0.05)
    hours = sum(plan.limit(m, a)[1] for m in plan.POLYPYTHIAS) / 3600
    assert hours == pytest.approx(6, abs=0.3)
    assert 7700 * a.files / a.calls / 3600 == pytest.approx(1.3, abs=0.05)
    assert plan.limit(plan.OLMO, a) == ("processor", pytest.approx(192 * 3600, rel=0.01))
    assert plan.limit(plan.OLMO_TENTH, a)[1] == pytest.approx(19 * 3600, rel=0.02)
    largest = plan.POLYPYTHIAS[-1]
    assert largest.alone_seconds(a) == pytest.approx(31 * 3600, rel=0.02)
    smallest = plan.POLYPYTHIAS[0]
    assert smallest.line_seconds(a) == smallest.all_checkpoints * a.files / a.calls


# --- Kubernetes ---


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    pod: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return pod


@pytest.fixture(scope="module")
def pool() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((KUBERNETES / "gpu-work-pool.json").read_text())
    return found


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / "measure-job.yaml").read_text())
    return found


def test_every_place_of_the_template_is_a_variable_and_every_variable_has_a_place(
    pool: dict[str, Any],
) -> None:
    variables = pool["variables"]["properties"]
    assert set(PLACE.findall(json.dumps(pool["job_configuration"]))) == set(variables)
    for name, variable in variables.items():
        assert variable["description"], name
        assert variable["title"], name
        assert "default" in variable or name in ("name", "command"), name


def test_prefect_takes_the_template(pool: dict[str, Any]) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    assert WorkPoolCreate(name="gpu", type="kubernetes", base_job_template=pool).base_job_template == pool


@pytest.mark.parametrize("kind", ["pool", "job"])
def test_pods_have_a_gpu_a_scratch_disk_and_keys_from_a_secret(
    kind: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(kind)
    pod = pod_of(found["job_configuration"]["job_manifest"] if kind == "pool" else found)
    (container,) = pod["containers"]
    assert "nvidia.com/gpu" in container["resources"]["limits"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert set(environment) == {"ONTOGENY_ROOT", SCRATCH}
    (mount,) = container["volumeMounts"]
    assert environment[SCRATCH] == mount["mountPath"]
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]
    assert "sizeLimit" in pod["volumes"][0]["emptyDir"]
    (source,) = container["envFrom"]
    assert set(source) == {"secretRef"}
    assert not pod["automountServiceAccountToken"]
    assert not re.search(r"AWS_SECRET_ACCESS_KEY\W+value", json.dumps(found))


def test_the_plain_job_measures_a_series_that_there_is(job: dict[str, Any]) -> None:
    program, command, series = pod_of(job)["containers"][0]["command"]
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert command == "measure"
    assert (ROOT / "deploy" / "series" / f"{series}.toml").is_file()
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
