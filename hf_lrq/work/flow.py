"""How matrices flow: out of a source, through their jobs, into a sink."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from hf_lrq.decomposition import CompressedMatrix, InputGram, OutputGram
from hf_lrq.nn import LRQEmbedding, LRQLinear
from hf_lrq.work.executor import Executor
from hf_lrq.work.job import Job
from hf_lrq.work.plan import Plan
from hf_lrq.work.records import LayerRecord
from hf_lrq.work.sites import Site


class Source(Protocol):
    """Where the uncompressed parameters come from: a model in memory, a loader, files."""

    def parameter(self, site: Site) -> Tensor:
        """The uncompressed parameter of a site, as its model holds it."""


class Sink(Protocol):
    """Where compressed matrices go: into the model, to a loader, into files."""

    def put(self, site: Site, matrices: Sequence[CompressedMatrix]) -> None:
        """Take all matrices of one site."""


class Task(NamedTuple):
    """One matrix on its way."""

    site: Site
    position: int
    job: Job


def compress_sites(
    plan: Plan,
    sites: Iterable[Site],
    source: Source,
    sink: Sink,
    executor: Executor,
    grams: Mapping[str, InputGram] | None = None,
    done: Callable[[LayerRecord], None] = lambda _: None,
    outputs: Mapping[str, OutputGram] | None = None,
) -> None:
    """Carry out a part of a plan. What is compressed reaches the sink when all of these sites are done.

    Args:
        plan: what to do.
        sites: some of the plan's.
        source, sink: where matrices come from and go to.
        executor: spreads the matrices.
        grams: name of a matrix -> Gram of its inputs; matrices without one are compressed without data.
        done: told about each matrix, in their order, in the calling thread.
        outputs: name of a matrix -> Gram of the gradients at its outputs.

    Raises:
        LRQError: as `Job.run` does; nothing has reached the sink then.
    """
    grams, outputs = grams or {}, outputs or {}
    sites = list(sites)
    tasks = [Task(site, position, job) for site in sites for position, job in enumerate(plan.jobs(site))]

    def run(task: Task) -> tuple[CompressedMatrix, LayerRecord]:
        W = task.site.matrix(source.parameter(task.site), task.position)
        return task.job.run(W, grams.get(task.job.name), outputs.get(task.job.name))

    results: dict[Site, list[CompressedMatrix]] = {site: [] for site in sites}
    for task, (matrix, record) in zip(tasks, executor.stream(run, tasks), strict=True):
        results[task.site].append(matrix)
        done(record)
    for site, matrices in results.items():
        sink.put(site, matrices)


class Held:
    """A source of parameters that are at hand, and a sink that keeps what is stored instead of them.

    Args:
        parameters: label of a site -> its uncompressed parameter.

    Attributes:
        values: full name of each stored tensor -> its value.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._parameters = parameters
        self.values: dict[str, Tensor] = {}

    def parameter(self, site: Site) -> Tensor:
        """See `Source`."""
        return self._parameters[site.label]

    def put(self, site: Site, matrices: Sequence[CompressedMatrix]) -> None:
        """See `Sink`."""
        self.values |= site.values(matrices)


class ModelSource:
    """The parameters of a model in memory."""

    def __init__(self, model: nn.Module):
        self._model = model

    def parameter(self, site: Site) -> Tensor:
        """See `Source`."""
        return self._model.get_parameter(site.parameter)


class ModelSink:
    """Puts compressed matrices into a model, in place of the modules that held them.

    Args:
        model: changed in place.
        modes: which modules were in training mode when they were last used; compressed layers get that mode.

    Attributes:
        installed: sites that are replaced.
    """

    def __init__(self, model: nn.Module, modes: Mapping[nn.Module, bool]):
        self._model, self._modes = model, modes
        self.installed = 0
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for key, child in parent._modules.items():
                self._places.setdefault(id(child), []).append((parent, key))

    def put(self, site: Site, matrices: Sequence[CompressedMatrix]) -> None:
        """See `Sink`."""
        module = self._model.get_submodule(site.name)
        layer = site.compressed(module, matrices)
        if isinstance(layer, LRQLinear | LRQEmbedding):
            layer.train(self._modes[module])
        # A module may hang in the model in more than one place.
        for parent, key in self._places.get(id(module), []):
            parent._modules[key] = layer
        for old, new in site.follow(self._model):
            new.train(self._modes[old])
        self.installed += 1


class Deferred:
    """Keeps what it gets until it is told to pass it on.

    Args:
        sink: gets it then.
    """

    def __init__(self, sink: Sink):
        self._sink = sink
        self._kept: list[tuple[Site, Sequence[CompressedMatrix]]] = []

    def put(self, site: Site, matrices: Sequence[CompressedMatrix]) -> None:
        """See `Sink`."""
        self._kept.append((site, matrices))

    def release(self) -> None:
        """Pass everything on."""
        for site, matrices in self._kept:
            self._sink.put(site, matrices)
        self._kept = []
