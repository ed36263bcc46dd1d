"""Calibration: a model runs over batches, and its sites are compressed on what they see, block by block."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import nn

from hf_lrq.calibration.blocks import find_stacks, is_stateful
from hf_lrq.calibration.calls import Call, Outputs
from hf_lrq.calibration.capture import InputRecorder, ModelRunner, StopPass
from hf_lrq.calibration.gradients import Sensitivity, sensitivity
from hf_lrq.calibration.grams import GramStore, Rows, of_all_tokens
from hf_lrq.calibration.probe import Probe, Section
from hf_lrq.calibration.recorder import StackRecorder, free
from hf_lrq.decomposition import InputGram, OutputGram
from hf_lrq.errors import CalibrationError
from hf_lrq.work import CompressionReport, Executor, Site
from hf_lrq.work.plan import listed

LISTED = 8  # Names spelled out in a warning.


class Work(Protocol):
    """What is to be done to a model, as its calibration sees it.

    Attributes:
        model: whose sites they are; `compress` may change it.
        sites: of all matrices that are to be compressed.
        report: gets the warnings, and what the calibration saw.
        seed: of every random choice.
        workers: run passes and products.
    """

    model: nn.Module
    sites: list[Site]
    report: CompressionReport

    @property
    def seed(self) -> int: ...

    @property
    def workers(self) -> Executor: ...

    def compress(
        self,
        title: str,
        sites: Sequence[Site],
        grams: Mapping[str, InputGram],
        outputs: Mapping[str, OutputGram] | None = None,
    ) -> None:
        """Compress some sites on these Grams of inputs and of gradients at outputs, by the name of the matrix."""


class Calibration:
    """Runs a model over calibration batches and compresses its sites on what they see.

    Args:
        work: what is to be done.
        runner: of the model, over the batches.
        sequential: whether each block sees the outputs of the compressed ones before it.
        two_sided: whether errors at the outputs are weighed, too.
        sensitivity: what is known of the outputs already; None looks for it where it is needed.
        correct: whether Grams also tell what the inputs are in the original model, see `decomposition.correction`.

    Attributes:
        sensitivity: what the outputs of the layers mean for those of the model, once `run` has begun.
    """

    def __init__(
        self,
        work: Work,
        runner: ModelRunner,
        sequential: bool,
        two_sided: bool = False,
        sensitivity: Sensitivity | None = None,
        correct: bool = False,
    ):
        if not len(runner):
            raise CalibrationError(
                "there are no calibration batches. Give at least one, or batches=None to compress without data."
            )
        self._work, self._runner, self._sequential, self._two_sided = work, runner, sequential, two_sided
        self.sensitivity = Sensitivity() if sensitivity is None else sensitivity
        self._look = two_sided and sensitivity is None
        self._correct = correct and sequential
        self._model, self._workers, self._report = work.model, work.workers, work.report
        self._one_by_one = is_stateful(work.model)
        self._short: dict[str, tuple[int, int]] = {}  # Matrix -> tokens seen, tokens needed.

    def run(self) -> None:
        """Calibrate and compress all sites."""
        probe = Probe(self._runner, find_stacks(self._model, self._work.sites), self._work.sites)
        self._workers.map(lambda _: probe.run(), [None])
        if self._look:
            self._look_at_outputs()
        for section in probe.sections():
            if section.stack is None:
                self._together(section.sites[""], probe, section.stop_early)
            else:
                self._stack(section, probe)
        self._warn_if_short()
        self._report.calibration = {
            "method": "sequential" if self._sequential else "independent",
            **(self.sensitivity.summary() if self._two_sided else {}),
            "sequences": self._runner.sequences,
            "tokens": max((layer.n_tokens for layer in self._report.layers), default=0),
        }

    def _look_at_outputs(self) -> None:
        """Grams of the gradients at the outputs, of the original model."""
        found = self.sensitivity = sensitivity(
            self._runner, self._work.sites, self._workers, self._work.seed, self._one_by_one
        )
        for reason in dict.fromkeys(found.without.values()):
            names = [name for name, why in found.without.items() if why == reason]
            self._report.warnings.append(f"{reason} {listed(names, LISTED)}: their outputs count alike.")

    def _stack(self, section: Section, probe: Probe) -> None:
        """All blocks of a stack, replayed if possible."""
        assert section.stack is not None, "sites outside of stacks go together"
        blocks = {name: section.stack.blocks[name] for name in section.sites}
        recorded = None if section.obstacle else self._record(blocks, section)
        if recorded is not None:
            self._replay(blocks, section, recorded)
            return
        why = section.obstacle or "the blocks do not follow each other in the same way for all batches"
        self._report.warnings.append(
            f"The blocks of {section.stack.name or 'the model'} could not be run one by one ({why}): "
            "the model was run from its start for each of them, which is slower and changes nothing else."
        )
        for name, sites in section.sites.items():
            self._together(sites, probe, section.stop_early, name)

    def _record(self, blocks: Mapping[str, nn.Module], section: Section) -> list[list[Call | None]] | None:
        """For each batch the calls of the blocks; None if a batch takes another way than those that were probed."""
        with StackRecorder(blocks) as recorder:

            def record(index: int) -> list[Call] | None:
                return recorder.record(self._runner, index, section.steps[self._runner.signature(index)])

            recorded = self._workers.map(record, range(len(self._runner)), self._one_by_one)
        found: list[list[Call | None]] = []
        for calls in recorded:
            if calls is None:
                return None
            found.append([*calls])
        return found

    def _replay(self, blocks: Mapping[str, nn.Module], section: Section, recorded: list[list[Call | None]]) -> None:
        """Block by block: inputs, Grams, compression, and the inputs of the next."""
        reached = [index for index, calls in enumerate(recorded) if calls]
        states: dict[int, Outputs] = {index: {} for index in reached}
        originals = states  # The same as long as nothing is compressed.
        names = list(blocks)
        for position, (name, block) in enumerate(blocks.items()):
            calls = {index: free(recorded[index], position) for index in reached}
            advance = self._stepper(block, calls, states)
            before = None if originals is states else self._stepper(block, calls, originals)
            sites, following = section.sites[name], names[position + 1 :]
            wanted = set(reached) if following and (self._correct or not self._sequential) else set()
            after: dict[int, Outputs] = {}
            if sites:
                grams, after = self._grams(sites, reached, advance, keep=wanted, original=before)
                self._work.compress(name, sites, grams, self.sensitivity.grams)
            if not following:
                return

            upcoming = {index: recorded[index][position + 1] for index in reached}
            if self._correct and (sites or before is not None):
                originals = self._moved(after, before or advance, upcoming)
                states = self._moved({}, advance, upcoming)
            else:
                originals = states = self._moved(after, advance, upcoming)

    def _moved(
        self, known: Mapping[int, Outputs], step: Callable[[int], Outputs], upcoming: Mapping[int, Call | None]
    ) -> dict[int, Outputs]:
        """What the next block takes of the outputs of this one; those that are not known are computed."""
        missing = [index for index in upcoming if index not in known]
        outputs = {**known, **dict(zip(missing, self._workers.map(step, missing, self._one_by_one), strict=True))}
        found = {}
        for index, call in upcoming.items():
            assert call is not None, "calls are freed in order"
            found[index] = call.needed(outputs[index])
        return found

    def _stepper(
        self, block: nn.Module, calls: Mapping[int, Call], states: Mapping[int, Outputs]
    ) -> Callable[[int], Outputs]:
        """What runs a block on one batch, from the outputs of the block before."""

        def step(index: int) -> Outputs:
            with self._runner.failures(index):
                return calls[index].run(block, states[index])

        return step

    def _together(self, sites: Sequence[Site], probe: Probe, stop_early: bool, block: str = "") -> None:
        """Sites calibrated on whole passes of the model as it is now; of a block, passes that end behind it."""
        if not sites:
            return

        def run(index: int) -> Outputs:
            self._runner.run(index)
            return {}

        def stop(*_: object) -> None:
            raise StopPass

        handle = None
        if block and probe.calls[block] == 1:
            handle = self._model.get_submodule(block).register_forward_hook(stop)
        try:
            called = [site for site in sites if probe.calls[site.name]]
            every = range(len(self._runner)) if called else ()
            grams, _ = self._grams(sites, every, run, stop_early=stop_early and not block)
        finally:
            if handle is not None:
                handle.remove()
        self._work.compress(block or "outside the blocks", sites, grams, self.sensitivity.grams)

    def _grams(
        self,
        sites: Sequence[Site],
        indices: Sequence[int],
        run: Callable[[int], Outputs],
        keep: set[int] | frozenset[int] = frozenset(),
        stop_early: bool = False,
        original: Callable[[int], Outputs] | None = None,
    ) -> tuple[dict[str, InputGram], dict[int, Outputs]]:
        """Grams of the matrices of some sites over passes that `run` makes, and the outputs of those in `keep`.

        Where `original` makes the same passes in the original model, the outputs are those of it.
        """
        store = GramStore([name for site in sites for name in site.matrices])
        outputs: dict[int, Outputs] = {}
        with InputRecorder(self._model, sites, stop_early) as recorder:

            def watch(index: int) -> tuple[Outputs, Rows, Rows]:
                weights, masks = self.sensitivity.weights_of(index), self._runner.masks(index)
                out, rows = recorder.watch(lambda: run(index), masks, weights)
                if original is None:
                    return out, rows, {}
                out, others = recorder.watch(lambda: original(index), masks, weights)
                return out, rows, of_all_tokens(rows, others)

            # As many batches at a time as there are threads: their inputs are all in memory.
            for start in range(0, len(indices), self._workers.count):
                window = indices[start : start + self._workers.count]
                watched = self._workers.map(watch, window, self._one_by_one)
                outputs |= {index: out for index, (out, *_) in zip(window, watched, strict=True) if index in keep}
                others = None if original is None else [each for *_, each in watched]
                store.add([rows for _, rows, _ in watched], window, self._workers, others)
        grams, without = store.finish()
        self._warn_of_missing(without)
        needed = {name: site.in_features for site in sites for name in site.matrices}
        for name, gram in grams.items():
            if gram.n_tokens < needed[name]:
                self._short[name] = (gram.n_tokens, needed[name])
        return grams, outputs

    def _warn_of_missing(self, without: Mapping[str, str]) -> None:
        for reason in dict.fromkeys(without.values()):
            names = [name for name, why in without.items() if why == reason]
            self._report.warnings.append(f"{reason} {listed(names, LISTED)}: compressed without data.")

    def _warn_if_short(self) -> None:
        if not self._short:
            return
        name, (seen, needed) = max(self._short.items(), key=lambda item: item[1][1] / max(item[1][0], 1))
        self._report.warnings.append(
            f"{len(self._short)} matrices saw fewer calibration tokens than they have inputs; the worst is {name} with "
            f"{seen} tokens for {needed} inputs. Use at least {-(-needed // max(seen, 1))} times as much data."
        )
