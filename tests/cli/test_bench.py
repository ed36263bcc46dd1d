"""`hf-lrq bench`: it measures what it says, and says what is wrong."""

import json

import pytest
import torch

from hf_lrq.cli.bench.generate import SHAPES, GenerateOptions, measure, random_model
from hf_lrq.cli.bench.kernels import BASELINE
from hf_lrq.cli.bench.timing import take_turns
from hf_lrq.nn import LRQLinear

CPU = torch.device("cpu")


def test_candidates_take_turns_and_go_through_their_copies() -> None:
    order: list[str] = []
    calls = {name: [lambda text=f"{name}{copy}": order.append(text) for copy in range(2)] for name in "ab"}
    timings = take_turns(calls, 3, CPU)
    warm_up = ["a0", "a1", "b0", "b1"]  # Every copy.
    assert order == [*warm_up, "a0", "b0", "a1", "b1", "a0", "b0"]
    assert {len(timing.seconds) for timing in timings.values()} == {3}
    assert timings["a"].least <= timings["a"].median


def test_kernels_beside_their_baselines(cli) -> None:
    options = ("--shape", "128x256", "--tokens", 1, "--repetitions", 2, "--megabytes", 1, "--rank", 4)
    result = cli("bench", "kernels", *options, "--codebook", "bt2", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows[BASELINE]["bytes"] == 2 * 128 * 256
    ours = rows["bt2, rank 4 at 8 bits, float inputs"]
    assert ours["backend"]
    # 2 bits, two scales of 16 bits and 128 of them, rotations and factors.
    assert 128 * 256 / 4 < ours["bytes"] < 128 * 256 / 4 * 1.5
    assert ours["times_as_fast"][BASELINE] == pytest.approx(rows[BASELINE]["milliseconds"] / ours["milliseconds"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels", "--shape", "4096"), "a shape is written OUTxIN, for example 4096x4096, got '4096'."),
        (("kernels", "--shape", "0x8"), "got '0x8'"),
        (("kernels", "--codebook", "bt9"), "Unknown codebook 'bt9'"),
        (("generate", "--shape", "9t"), "shape must be one of tiny, 1b, 3b, 7b, 8b, got '9t'."),
        (("generate", "--codebook", "bt"), "Unknown codebook 'bt'"),
    ],
)
def test_wrong_arguments_are_named(cli, arguments, message) -> None:
    assert message in cli.fails("bench", *arguments, "--device", "cpu")


def test_a_random_model_is_whole(rng_untouched: None) -> None:
    made: list[torch.nn.Linear] = []

    def make(linear: torch.nn.Linear) -> torch.nn.Module:
        assert linear.weight.is_meta  # The uncompressed weight never exists.
        made.append(linear)
        return torch.nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16)

    with torch.random.fork_rng(devices=[]):
        model = random_model("tiny", make, CPU)
        assert len(made) == 7 * SHAPES["tiny"][0]
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.isfinite(model(torch.arange(4).unsqueeze(0)).logits).all()


@pytest.mark.parametrize(("name", "activation"), [("compressed", "float"), ("compressed, fused, int8 inputs", "int8")])
def test_a_compressed_model_writes(name: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    forward = LRQLinear.forward

    def watch(self, *arguments, **options):
        seen.add(self.activation)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(LRQLinear, "forward", watch)
    options = GenerateOptions(
        shape="tiny",
        codebook="bt2",
        rank=4,
        factor_bits=8,
        prompt=5,
        tokens=3,
        repetitions=1,
        static_cache=False,
        compiled=False,
        with_peers=False,
        device="cpu",
        threads=None,
        as_json=False,
    )
    run = measure(name, options, CPU)
    assert seen == {activation}
    assert run.decode > 0
    assert run.prefill > 0
    # The tied embedding in 16 bits, and some 3 bits for each other weight.
    assert 2048 * 256 * 2 < run.weight_bytes < 2048 * 256 * 2 + 5 * 852_000 * 4 / 8
