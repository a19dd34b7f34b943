"""What a Prefect server needs of us: pool, limits, automations, the deployments of deploy/prefect.yaml."""

import os
from pathlib import Path
from typing import Any

import prefect
import yaml
from prefect.automations import AutomationCore
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.schedules import Cron
from prefect.settings import PREFECT_API_URL
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker

from flows import deployed
from storage.errors import UsageError
from tasks.gpu import GPU_LIMIT

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
POOL, DOWNLOADS = "ontogeny", "downloads"
"""Work pool, and its queue of runs that download."""
WEBHOOK_BLOCK = "ontogeny-alerts"


def read_deployments() -> list[dict[str, Any]]:
    """The deployments as deploy/prefect.yaml has them."""
    entries: list[dict[str, Any]] = _read(DEPLOY / "prefect.yaml")["deployments"]
    return entries


def deployments() -> list[RunnerDeployment]:
    """The same for ``prefect.serve``, found by module, so that the current folder does not matter."""
    return [_deployment(entry) for entry in read_deployments()]


def _deployment(entry: dict[str, Any]) -> RunnerDeployment:
    flow = getattr(deployed, entry["entrypoint"].partition(":")[2])
    limit = entry.get("concurrency_limit")
    schedules = [
        Cron(each["cron"], timezone=each["timezone"], active=each["active"]) for each in entry["schedules"]
    ]
    made: RunnerDeployment = flow.to_deployment(
        entry["name"],
        schedules=schedules,
        parameters=entry["parameters"],
        description=entry["description"],
        tags=entry["tags"],
        concurrency_limit=None if limit is None else ConcurrencyLimitConfig(**limit),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return made


def serve_all(root: str, limit: int) -> None:
    """Register the deployments and run them here until interrupted, ``limit`` at a time.

    Raises:
        UsageError: no server is configured.
    """
    need_server()
    os.environ["ONTOGENY_ROOT"] = root  # of every run: each is a process of its own
    prefect.serve(*deployments(), limit=limit)


def need_server() -> str:
    """URL of the server.

    Raises:
        UsageError: none is configured.
    """
    url = PREFECT_API_URL.value()
    if not url:
        raise UsageError(
            "no Prefect server is configured: start one (`make server`, or `prefect server start`) and set "
            "PREFECT_API_URL, as http://127.0.0.1:4200/api"
        )
    return str(url)


def bootstrap(
    gpus: int = 1, downloads: int = 2, webhook: str | None = None, silence: int | None = None
) -> list[str]:
    """Create or renew what the deployments rest on; say what, one line each.

    Args:
        gpus: checkpoints that run on GPUs at once, over all workers that name the limit.
        downloads: runs that download at once.
        silence: seconds without a sign of life after which a run counts as crashed; None: as in the file.
        webhook: URL that is called on every alert of a watch; None leaves the automation as it is.

    Raises:
        UsageError: no server is configured.
    """
    need_server()
    with get_client(sync_client=True) as client:
        _pool(client, downloads)
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, gpus)
        zombies = _read(DEPLOY / "automations" / "zombies.yaml")
        if silence is not None:
            zombies["trigger"]["within"] = silence
        _automation(client, zombies)
        said = [
            f"work pool {POOL} with queue {DOWNLOADS} ({downloads} runs at a time)",
            f"limit {GPU_LIMIT} ({gpus} at a time)",
            f"automation ontogeny-zombies (after {zombies['trigger']['within']} s of silence)",
        ]
        if webhook is not None:
            block = Webhook(url=webhook).save(WEBHOOK_BLOCK, overwrite=True)
            automation = _read(DEPLOY / "automations" / "webhook.yaml")
            automation["actions"][0]["block_document_id"] = str(block)
            _automation(client, automation)
            said.append("automation ontogeny-webhook")
    return said


def _pool(client: SyncPrefectClient, downloads: int) -> None:
    template = ProcessWorker.get_default_base_job_template()
    try:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    except ObjectAlreadyExists:
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))
    try:
        queue = client.read_work_queue_by_name(DOWNLOADS, work_pool_name=POOL)
    except ObjectNotFound:
        client.create_work_queue(DOWNLOADS, concurrency_limit=downloads, work_pool_name=POOL)
    else:
        client.update_work_queue(queue.id, concurrency_limit=downloads)


def _automation(client: SyncPrefectClient, data: dict[str, Any]) -> None:
    automation = AutomationCore.model_validate(data)
    known = client.read_automations_by_name(automation.name)
    if known:
        client.update_automation(known[0].id, automation)
    else:
        client.create_automation(automation)


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return data
