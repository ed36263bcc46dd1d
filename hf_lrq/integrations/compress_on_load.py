"""Compression of weights one by one, as transformers loads them."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from hf_lrq.calibration.compress import DATA_FREE
from hf_lrq.decomposition import CompressedMatrix
from hf_lrq.errors import CompressionError
from hf_lrq.integrations.decompression import with_hook_of
from hf_lrq.integrations.loading import put_empty
from hf_lrq.integrations.tables import tables_of
from hf_lrq.work import (
    CompressionReport,
    EmbeddingSite,
    Held,
    Inline,
    Inventory,
    LayerRecord,
    ModelSource,
    Plan,
    Site,
    compress_sites,
)
from hf_lrq.work.plan import nothing_left
from hf_lrq.work.sites import joined


class LoadingCompression:
    """A plan that is carried out while the parameters of a model arrive.

    Puts compressed layers into the model, with the uncompressed parameter still in place for transformers to load into.

    Args:
        model: a PreTrainedModel whose weights are still to be loaded.
        plan: made for it.
    """

    def __init__(self, model: Any, plan: Plan):
        # What is tied to an embedding is known when everything is loaded: they are compressed then.
        self._embeddings = [site for site in plan.specs if isinstance(site, EmbeddingSite)]
        self._plan = plan
        self._awaited = {site.parameter: site for site in plan.specs if site not in self._embeddings}
        self._records: dict[Site, list[LayerRecord]] = {}
        self._siblings = Counter(site.name for site in plan.specs)
        self._uncompressed: dict[Site, Tensor] = {}  # As long as another stack of the module can be left alone.
        self._problems: dict[str, str] = {}  # Label of a site -> why it is left alone after all.
        self._missing: set[str] | None = None
        self._failure: Exception | None = None
        self._started = time.monotonic()
        streamed = {site: plan.specs[site].layout for site in self._awaited.values()}
        put_empty(model, streamed, keep_parameters=True)

    def awaits(self, name: str) -> bool:
        """Whether this parameter is compressed as it is loaded."""
        return name in self._awaited

    def element_size(self, name: str, parameter: Tensor) -> float | None:
        """Bytes that will be stored for each element of a parameter; None for one that is not compressed."""
        site = self._awaited.get(name)
        if site is None:
            return None
        if site.holder != site.name:
            return 0.0  # What takes its place is a module of its own, counted as such.
        layout = self._plan.specs[site].layout
        return layout.tensors(site.out_features, site.in_features)["weight"].bytes / parameter.numel()

    def convert(self, name: str, parameter: Tensor, model: Any, missing: set[str] | None) -> dict[str, Tensor]:
        """Full name -> value of all that replaces a parameter; one that is not awaited stays as it is.

        Args:
            name: of the parameter in the model.
            parameter: as it was loaded.
            model: that is being loaded.
            missing: transformers' list of parameters that are still missing.
        """
        site = self._awaited.get(name)
        if site is None:
            return {name: parameter}
        self._missing = missing
        if self._left_alone(site, parameter):
            (missing or set()).difference_update(site.tensors(self._plan.specs[site].layout))
            return {name: parameter}
        values = self._compressed(site, parameter)
        # Some models' initialisation would look at the shape of a weight.
        model.get_submodule(site.name)._is_hf_initialized = True
        self._remove(site, model)
        return {key: frozen(value, parameter.device) for key, value in values.items()}

    def finish(self, model: Any) -> tuple[Inventory, CompressionReport]:
        """Deal with parameters that did not arrive by themselves; what the model is now, and what was done to it.

        Raises:
            Exception: the first failure of `convert`.
            CompressionError: if an awaited parameter is not in the checkpoint.
        """
        if self._failure is not None:
            raise self._failure
        for name, site in self._awaited.items():
            if site not in self._records and site.label not in self._problems:
                self._finish_site(model, name, site)
        for site in self._embeddings:
            self._compress_embedding(model, site)
        plan = self._plan.without(self._problems)
        if not plan.specs:
            raise CompressionError(nothing_left(type(model).__name__, plan.left_alone))
        for site in self._plan.specs.keys() - plan.specs.keys() - set(self._embeddings):
            self._restore(model, site)
        self._zero_missing_biases(model, plan)
        inventory = plan.inventory
        report = inventory.report()
        report.layers = [record for site in inventory.layouts for record in self._records[site]]
        report.seconds = time.monotonic() - self._started
        report.calibration = dict(DATA_FREE)
        return inventory, report

    def _finish_site(self, model: Any, name: str, site: Site) -> None:
        if self._missing is not None and name not in self._missing:
            # It came together with other weights, in one tensor that transformers took apart.
            parameter = model.get_parameter(name)
            if self._left_alone(site, parameter):
                return
            values = self._run(site, parameter)
            self._remove(site, model)
            for key, value in values.items():
                setattr(model.get_submodule(site.holder), key.rpartition(".")[2], frozen(value, parameter.device))
            return
        if site.routed:
            raise CompressionError(f"the checkpoint has no {name}. Load it without compression to see what it has.")
        # A head that this class adds to the model that was saved; transformers has initialised it.
        self._problems[site.label] = "not in the checkpoint, newly initialised"

    def _compress_embedding(self, model: Any, site: Site) -> None:
        """Compress a table that was loaded as it is, for all modules that are tied to it now."""
        tied = tables_of(model)[0]
        parameter = model.get_parameter(site.parameter)
        if next((other.modules for other in tied if other == site), ()) != site.modules:
            self._problems[site.label] = "not tied to what its model ties it to, as the checkpoint holds both"
        elif not self._left_alone(site, parameter):
            done = self._records.setdefault(site, []).append
            compress_sites(self._plan, [site], ModelSource(model), _Installing(model), Inline(), done=done)

    def _zero_missing_biases(self, model: Any, plan: Plan) -> None:
        """Initialise those that the checkpoint has not, as every model of transformers does."""
        for site in plan.specs:
            bias = model.get_submodule(site.holder)._parameters.get("bias")
            if bias is not None and joined(site.holder, "bias") in (self._missing or ()):
                bias.data.zero_()

    def _left_alone(self, site: Site, parameter: Tensor) -> bool:
        """Whether a parameter cannot be compressed, or belongs to a module with one that cannot."""
        if torch.isfinite(parameter).all() and (problem := site.scale_problem(parameter)) is not None:
            self._problems[site.label] = problem
        elif any(other.name == site.name and other.label in self._problems for other in self._plan.specs):
            self._problems[site.label] = "its other stack is left alone"
        return site.label in self._problems

    def _restore(self, model: Any, site: Site) -> None:
        """Put the uncompressed module back."""
        module = model.get_submodule(site.name)
        parameter = self._uncompressed.get(site)
        plain = site.untouched(module, model.get_parameter(site.parameter) if parameter is None else parameter)
        if plain is not module:
            model.set_submodule(site.name, plain)

    def _remove(self, site: Site, model: Any) -> None:
        """Take the uncompressed parameter away, unless a compressed one has its name."""
        if site.holder != site.name:
            delattr(model.get_submodule(site.name), site.parameter.rpartition(".")[2])
            if self._missing is not None:
                self._missing.discard(site.parameter)

    def _compressed(self, site: Site, parameter: Tensor) -> dict[str, Tensor]:
        if self._failure is None:
            try:
                return self._run(site, parameter)
            except Exception as error:
                # transformers would log this, go on, and end with an error that says nothing. Raised after loading.
                self._failure = error
        layout = self._plan.specs[site].layout
        return {key: torch.zeros(each.shape, dtype=each.dtype) for key, each in site.tensors(layout).items()}

    def _run(self, site: Site, parameter: Tensor) -> dict[str, Tensor]:
        if self._siblings[site.name] > 1:
            self._uncompressed[site] = parameter
        held = Held({site.label: parameter})
        records = self._records.setdefault(site, [])
        compress_sites(self._plan, [site], held, held, Inline(), done=records.append)
        siblings = [other for other in self._uncompressed if other.name == site.name]
        if len(siblings) == self._siblings[site.name]:
            for other in siblings:
                del self._uncompressed[other]
        return held.values


class _Installing:
    """A sink that puts a compressed table into the model, with the hooks of what it replaces."""

    def __init__(self, model: Any):
        self._model = model

    def put(self, site: Site, matrices: Sequence[CompressedMatrix]) -> None:
        """See `Sink`."""
        old = self._model.get_submodule(site.name)
        new = site.compressed(old, matrices)
        self._model.set_submodule(site.name, with_hook_of(old, new.train(old.training)))
        for old, new in site.follow(self._model):
            with_hook_of(old, new.train(old.training))


class CompressOnLoad(ConversionOps):
    """What transformers calls with a weight that is compressed as it is loaded."""

    def __init__(self, loading: LoadingCompression):
        self._loading = loading

    def convert(self, input_dict: dict[str, Any], *_: Any, **context: Any) -> dict[str, Any]:
        """{full name: weight} -> {full name: tensor} of everything stored instead."""
        converted: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            converted |= self._loading.convert(name, weight, context["model"], context.get("missing_keys"))
        return converted


def frozen(value: Tensor, device: torch.device) -> nn.Parameter:
    """A parameter on `device` that is not trained."""
    return nn.Parameter(value.to(device), requires_grad=False)
