"""Where the jobs of a sweep run: processes on this machine, or a Dask cluster, both through joblib."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import field
from typing import Any, Literal

from metaopt_lens._configuration import Count, settings
from metaopt_lens._errors import OptionError

_JOBQUEUE = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
    "htcondor": "HTCondorCluster",
    "moab": "MoabCluster",
    "oar": "OARCluster",
}


@settings
class Workers:
    """The processes that work on a sweep.

    Attributes:
        engine: ``"processes"`` on this machine, or ``"dask"``.
        n: how many.
        threads: threads of torch in each; results are only the same to the last digit with the same number.
        cluster: for Dask: ``"local"``, or a batch system that dask-jobqueue knows (``"slurm"``, ...).
        address: for Dask: a running scheduler instead, such as ``"tcp://host:8786"``.
        options: handed to the cluster's class.
    """

    engine: Literal["processes", "dask"] = "processes"
    n: Count = 1
    threads: Count = 1
    cluster: Literal["local", "slurm", "pbs", "sge", "lsf", "htcondor", "moab", "oar"] = "local"
    address: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Call `function` with every tuple of arguments; results in the order in which they are ready."""
        import joblib

        work = [joblib.delayed(function)(*job) for job in jobs]
        with ExitStack() as stack:
            if self.engine == "dask":
                stack.enter_context(self._client())
                stack.enter_context(joblib.parallel_config(backend="dask"))
                parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)
            else:
                parallel = joblib.Parallel(n_jobs=self.n, return_as="generator_unordered", batch_size=1)
            yield from parallel(work)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        try:
            import distributed
        except ImportError:
            raise OptionError("the Dask engine is not installed: pip install 'metaopt-lens[cluster]'.") from None
        with ExitStack() as stack:
            where: Any = self.address
            if where is None:
                where = stack.enter_context(self._cluster(distributed))
            client = stack.enter_context(distributed.Client(where))
            yield client

    def _cluster(self, distributed: Any) -> Any:
        if self.cluster == "local":
            options: dict[str, Any] = {"n_workers": self.n, "threads_per_worker": 1, "processes": True}
            options |= {"dashboard_address": None, "silence_logs": logging.ERROR}
            return distributed.LocalCluster(**{**options, **self.options})
        try:
            import dask_jobqueue
        except ImportError:
            raise OptionError("dask-jobqueue is not installed: pip install 'metaopt-lens[cluster]'.") from None
        cluster = getattr(dask_jobqueue, _JOBQUEUE[self.cluster])(**self.options)
        cluster.scale(self.n)
        return cluster
