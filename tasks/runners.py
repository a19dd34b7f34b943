"""Where walks run: threads, processes, Dask or Ray, each with the GPUs that it was asked for."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from storage.errors import UsageError
from tasks.models import choose_device

Kind = Literal["threads", "processes", "dask", "ray"]
_PACKAGES = {"dask": ("prefect_dask", "distributed"), "ray": ("prefect_ray", "ray")}


@dataclass(frozen=True)
class Workers:
    """How many workers of which kind; ``address`` of a cluster that runs already, ``gpus`` of each worker."""

    kind: Kind
    count: int
    address: str | None = None
    gpus: float = 0

    @property
    def remote(self) -> bool:
        """Whether workers run on machines of a cluster that others started."""
        return self.address is not None

    def check(self) -> None:
        """Refuse what cannot be run, before anything is listed.

        Raises:
            UsageError: the extra of a runner is not installed, or an address is given that nobody reads.
        """
        if self.remote and self.kind in ("threads", "processes"):
            raise UsageError(
                f"measure.address is {self.address!r}, but measure.runner {self.kind!r} runs on this machine"
            )
        for package in _PACKAGES.get(self.kind, ()):
            if importlib.util.find_spec(package) is None:
                raise UsageError(
                    f"measure.runner is {self.kind!r}, but the package {package!r} is not installed: "
                    f"pip install -e '.[{self.kind}]' in the checkout brings it"
                )
        if self.kind == "ray" and not self.remote and self.count * self.gpus > torch.cuda.device_count():
            raise UsageError(
                f"{self.count} workers with measure.gpus of {self.gpus:g} each would wait for ever: "
                f"this machine has {torch.cuda.device_count()} usable GPUs"
            )
        if self.remote and not PREFECT_API_URL.value():
            raise UsageError(
                f"workers at {self.address!r} cannot report to a temporary Prefect server: "
                "start one that they reach and set PREFECT_API_URL"
            )

    def device(self, number: int, device: str) -> str:
        """The device of worker ``number``: on this machine, GPUs are dealt out in turn.

        Ray, and Dask's CUDA workers, show each worker its own GPUs alone.
        """
        if self.remote or self.kind == "ray" or device not in ("auto", "cuda"):
            return device
        gpus = torch.cuda.device_count() if choose_device(device).type == "cuda" else 0
        return f"cuda:{number % gpus}" if gpus else device

    @contextmanager
    def open(self) -> Iterator[TaskRunner[Any]]:
        """The task runner, started; what it started ends with it."""
        # Worker processes inherit it: their lines would come between those of the command.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        with temporary_settings({PREFECT_API_URL: _api()}), self._runner() as runner, self._resources():
            yield runner

    def _runner(self) -> TaskRunner[Any]:
        if self.kind == "threads":
            return ThreadPoolTaskRunner(max_workers=self.count)
        if self.kind == "processes":
            return ProcessPoolTaskRunner(max_workers=self.count)
        return self._dask() if self.kind == "dask" else self._ray()

    def _dask(self) -> TaskRunner[Any]:
        from prefect_dask import DaskTaskRunner

        if self.address is not None:
            remote: TaskRunner[Any] = DaskTaskRunner(address=self.address)
            return remote
        cluster = {
            "n_workers": self.count,
            "threads_per_worker": 1,
            "processes": True,
            "host": "127.0.0.1",
            "dashboard_address": None,
            "resources": {"GPU": self.gpus} if self.gpus else None,
        }
        local: TaskRunner[Any] = DaskTaskRunner(cluster_kwargs=cluster)
        return local

    def _ray(self) -> TaskRunner[Any]:
        from prefect_ray import RayTaskRunner

        if self.address is not None:
            remote: TaskRunner[Any] = RayTaskRunner(
                address=self.address, init_kwargs={"log_to_driver": False}
            )
            return remote
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # it listens on loopback only
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local: TaskRunner[Any] = RayTaskRunner(
            init_kwargs={
                "num_cpus": self.count,
                "include_dashboard": False,
                "log_to_driver": False,
                "_node_ip_address": "127.0.0.1",
            }
        )
        return local

    def _resources(self) -> AbstractContextManager[Any]:
        """Within it, a submitted task asks for its GPUs."""
        if self.kind == "ray":
            from prefect_ray.context import remote_options

            # A walk has its own ways to go on after a death: no second try by Ray.
            options: AbstractContextManager[Any] = remote_options(
                num_cpus=1, num_gpus=self.gpus, max_retries=0
            )
            return options
        if self.kind == "dask" and self.gpus:
            import dask

            context: AbstractContextManager[Any] = dask.annotate(resources={"GPU": self.gpus})
            return context
        return nullcontext()


def dealt(devices: Sequence[str], number: int, workers: int) -> tuple[str, ...]:
    """Those of ``devices`` that worker ``number`` has: one, or its share where there are fewer workers."""
    if not devices:
        return ()
    return tuple(devices[number % len(devices) :: workers])


def _api() -> str | None:
    """URL of the Prefect server that this flow talks to, a temporary one too, for worker processes."""
    url: str | None = PREFECT_API_URL.value()
    if url is not None:
        return url
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    return server.api_url if server.running else None
