"""One matrix of a model, compressed: the same for every way a weight comes in and every place its result goes to."""

import time
from dataclasses import dataclass

from torch import Tensor

from hf_lrq.decomposition import CompressedMatrix, InputGram, OutputGram, compress_matrix, generator_for, input_rotation
from hf_lrq.errors import LRQError
from hf_lrq.matrices import QuantizedMatrix
from hf_lrq.spec import LayerSpec
from hf_lrq.work.records import LayerRecord


@dataclass(frozen=True)
class Job:
    """All that decides over the compression of one matrix but its numbers; can be sent anywhere.

    Attributes:
        name: of the matrix; with the seed it decides every random choice.
        kind: of its site, for the record.
        spec: what to do.
        seed: see `name`.
        kept: Q, where it is known already and is to stay.
    """

    name: str
    kind: str
    spec: LayerSpec
    seed: int
    kept: QuantizedMatrix | None = None

    def run(
        self, W: Tensor, gram: InputGram | None, output: OutputGram | None = None
    ) -> tuple[CompressedMatrix, LayerRecord]:
        """Compress W [out, in]; without a Gram of its inputs, without data; without one of its outputs, they are alike.

        Raises:
            LRQError: as `compress_matrix` does, with the name of the matrix before the message.
        """
        started = time.monotonic()
        rotate_in = input_rotation(self.seed, self.name, W.shape[1], self.spec)
        generator = generator_for(self.seed, self.name)
        try:
            matrix = compress_matrix(W, gram, self.spec, generator, rotate_in, output=output, kept=self.kept)
        except LRQError as error:
            raise type(error)(f"{self.name}: {error}") from error
        return matrix, LayerRecord.of(self.name, self.kind, self.spec.bits, matrix, time.monotonic() - started)
