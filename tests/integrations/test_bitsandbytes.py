"""Models in 4 bits of bitsandbytes become ours and ours theirs; folders are made here, from what is known of them.

Where bitsandbytes is installed, it is asked as well.
"""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers import LlamaForCausalLM as Llama

from hf_lrq import LRQConfig
from hf_lrq.checkpoint import read_config
from hf_lrq.errors import CheckpointError, CompressionError, LRQError, SpecError
from hf_lrq.integrations.bitsandbytes import export_bitsandbytes, import_bitsandbytes
from hf_lrq.integrations.bitsandbytes.states import read_matrix
from hf_lrq.integrations.peft.exporting import save_factors
from hf_lrq.integrations.saving import save
from hf_lrq.nn import LRQLinear

IDS = torch.arange(3, 60)[None]
KINDS = [(kind, double) for kind in ("nf4", "fp4") for double in (False, True)]
UP = "model.layers.1.mlp.up_proj"
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def tiny(**options: Any) -> Llama:
    """Of weights that bfloat16 can hold, computed in float32."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{**shape, "num_key_value_heads": 2, "vocab_size": 96, "initializer_range": 0.1, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _short(Llama(config))


def _short(model: Any) -> Any:
    """With parameters that bfloat16 can hold; buffers keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model.eval()


@pytest.fixture(scope="module")
def nf4(four_bits: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_bits(tiny(), tmp_path_factory.mktemp("four") / "nf4")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.float()


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_codes_stay_and_so_do_the_outputs(
    four_bits: Callable[..., Path], tmp_path: Path, kind: str, double: bool, rng_untouched: None
) -> None:
    rounded = tiny()
    folder = four_bits(rounded, tmp_path / "theirs", kind, double)
    model = import_bitsandbytes(folder)
    # Scales of bfloat16 weights are exact in float16; those of double quantization are within 2^-11.
    assert difference(logits(model), logits(rounded)) <= (2e-3 if double else 1e-6)
    files, layer = load_file(folder / "model.safetensors"), model.get_submodule(UP)
    assert isinstance(layer, LRQLinear)
    assert (layer.layout.codebook, layer.layout.group_size, layer.rank) == (f"bnb{kind}", 64, 0)
    assert torch.equal(layer.weight.flatten(), files[f"{UP}.weight"].flatten())
    assert difference(layer.dense(), rounded.get_submodule(UP).weight) <= (2**-11 if double else 0)
    assert sum(isinstance(module, LRQLinear) for module in model.modules()) == 14


def test_a_model_that_was_taken_over_saves_and_loads(nf4: Path, tmp_path: Path) -> None:
    model = import_bitsandbytes(nf4)
    save(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    report = json.loads((tmp_path / "ours" / "quantization_report.json").read_text())
    assert report["base_model"]["file"] == "NF4 of bitsandbytes in blocks of 64, codes as they were"


def test_modules_that_are_not_in_four_bits_are_left_alone(four_bits: Callable[..., Path], tmp_path: Path) -> None:
    rounded = tiny()
    model = import_bitsandbytes(four_bits(rounded, tmp_path / "theirs", but=(UP,)))
    assert type(model.get_submodule(UP)) is torch.nn.Linear
    assert model.hf_quantizer.inventory.left_alone[UP] == "not in 4 bits in the model of bitsandbytes"
    assert difference(logits(model), logits(rounded)) <= 1e-6


def test_transposed_layers_are_taken_over(four_bits: Callable[..., Path], tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=64, initializer_range=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rounded = _short(GPT2LMHeadModel(config))
    model = import_bitsandbytes(four_bits(rounded, tmp_path / "theirs"))
    assert difference(logits(model), logits(rounded)) <= 1e-6
    assert sum(isinstance(module, LRQLinear) for module in model.modules()) == 4


def test_factors_are_the_best_for_the_codes(nf4: Path) -> None:
    original = tiny()
    plain, model = import_bitsandbytes(nf4), import_bitsandbytes(nf4, original, rank=8, factor_bits=16)
    for name, layer in model.named_modules():
        if isinstance(layer, LRQLinear):
            E = original.get_submodule(name).weight.data - plain.get_submodule(name).dense()
            left = original.get_submodule(name).weight.data - layer.dense()
            assert torch.equal(layer.weight, plain.get_submodule(name).weight)
            # Eckart and Young; float16 factors add next to nothing.
            assert left.norm() == pytest.approx(torch.linalg.svdvals(E)[8:].norm().item(), rel=1e-3)
    assert difference(logits(model), logits(original)) < difference(logits(plain), logits(original))
    assert torch.equal(original.get_submodule(UP).weight, tiny().get_submodule(UP).weight)


def test_data_decides_over_the_factors(nf4: Path, generator: torch.Generator) -> None:
    """With inputs that are far from white, what the layers give for them gets nearer than without data."""
    original = tiny()
    ids = torch.randint(0, 8, (16, 32), generator=generator)
    with_data = import_bitsandbytes(nf4, original, [ids], rank=4, factor_bits=16)
    without = import_bitsandbytes(nf4, original, rank=4, factor_bits=16)
    with torch.no_grad():
        wanted, one, other = (model(ids).logits for model in (original, with_data, without))
    assert (one - wanted).norm() < (other - wanted).norm()


def test_the_same_seed_gives_the_same_bytes(nf4: Path) -> None:
    one, other = (import_bitsandbytes(nf4, tiny(), rank=4).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("kind", "shard"), [("nf4", "50GB"), ("fp4", "20KB")])
def test_the_way_back_gives_the_same_bytes(
    four_bits: Callable[..., Path], tmp_path: Path, kind: str, shard: str
) -> None:
    folder = four_bits(tiny(), tmp_path / "theirs", kind)
    written = export_bitsandbytes(import_bitsandbytes(folder), tmp_path / "back", max_shard_size=shard)
    assert (written.matrices, written.lora) == (14, None)
    before = load_file(folder / "model.safetensors")
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    after = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert (len(files) > 1) == (shard == "20KB")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "quant_state" in name:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(after[name].tolist()))
        else:
            assert torch.equal(tensor, after[name]), name
    declared = read_config(tmp_path / "back")["quantization_config"]
    assert declared["bnb_4bit_quant_type"] == kind
    assert declared["llm_int8_skip_modules"] == ["lm_head"]
    assert torch.equal(logits(import_bitsandbytes(tmp_path / "back")), logits(import_bitsandbytes(folder)))


def test_what_we_round_can_be_given_away(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "original")
    config = LRQConfig(codebook="bnbnf", bits=4, group_size=64, rotation="none", rank=0, embedding_bits=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config)
    export_bitsandbytes(model, tmp_path / "theirs")
    assert torch.equal(logits(import_bitsandbytes(tmp_path / "theirs")), logits(model))


def test_factors_have_no_place_but_beside(nf4: Path, tmp_path: Path) -> None:
    model = import_bitsandbytes(nf4, tiny(), rank=4)
    with pytest.raises(SpecError, match=r"layers\.0\.self_attn\.q_proj has L R of 4 ranks, .* as a LoRA: --lora"):
        export_bitsandbytes(model, tmp_path / "theirs")
    assert list(tmp_path.iterdir()) == []
    written = export_bitsandbytes(model, tmp_path / "theirs", save_factors)
    assert written.lora == tmp_path / "theirs" / "lora"
    pairs = load_file(written.lora / "adapter_model.safetensors")
    L, R = model.get_submodule(UP).low_rank()
    assert torch.equal(pairs[f"base_model.model.{UP}.lora_A.weight"], R.float())
    assert torch.equal(pairs[f"base_model.model.{UP}.lora_B.weight"], L.float())
    settings = json.loads((written.lora / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == settings["r"] == 4
    assert len(settings["target_modules"]) == 14
    with pytest.raises(SpecError, match="no compressed layer of this model has L R"):
        save_factors(import_bitsandbytes(nf4), tmp_path / "none")


def test_what_bitsandbytes_cannot_hold_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "original")
    kept = {"codebook": "bnbnf", "bits": 4, "rank": 0}
    for options, message in (
        ({**kept, "group_size": 64}, r"q_proj is stored with codebook 'bnbnf4' and rotation 'hadamard'"),
        ({**kept, "group_size": 128, "rotation": "none"}, r"q_proj has 64 inputs, which are not whole blocks of 128"),
        (
            {"embedding_bits": 8},
            "model.embed_tokens is LRQEmbedding; bitsandbytes takes linear layers.*embedding_bits=16",
        ),
        ({"bits": 4, "codebook": "nf", "rank": 0, "rotation": "none"}, "stored with codebook 'nf4'"),
    ):
        config = LRQConfig(**{"embedding_bits": 16, **options}, iters=1, rounding="nearest")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config)
        with pytest.raises(SpecError, match=message):
            export_bitsandbytes(model, tmp_path / "theirs")
    with pytest.raises(SpecError, match="has no compressed layers"):
        export_bitsandbytes(tiny(), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def changed(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a folder whose tensors were changed."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


def _state(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = f"{UP}.weight.quant_state.bitsandbytes__nf4"
        state = {**json.loads(bytes(tensors[key].tolist())), **changes}
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.weight.absmax"), r"up_proj\.weight\.absmax is missing"),
        (lambda t: t.pop(f"{UP}.weight"), r"but model\S+up_proj\.weight is missing"),
        (lambda t: t.pop(f"{UP}.weight.quant_state.bitsandbytes__nf4"), "up_proj.weight has 0 states"),
        (
            lambda t: t.update({f"{UP}.weight.quant_map": torch.linspace(-1, 1, 16)}),
            "is another table than that of nf4",
        ),
        (lambda t: t.update({f"{UP}.weight.absmax": t[f"{UP}.weight.absmax"] * 1e6}), "ends at 65504"),
        (lambda t: t.update({f"{UP}.weight.absmax": torch.ones(5)}), "has 5 scales, its shape takes 128"),
        (lambda t: t.update({f"{UP}.SCB": torch.ones(128)}), r"up_proj is in 8 bits \(LLM\.int8\(\)\)"),
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors of the model, such as model\.norm\.weight"),
        (_state(blocksize=12), "up_proj.weight has blocks of 12 weights"),
        (_state(blocksize=256), r"up_proj\.weight \[128, 64\] has blocks of 256 weights, some of them in two rows"),
        (_state(blocksize="64"), "blocksize must be a positive integer, got '64'"),
        (_state(shape=[2, 64, 64]), r"has the shape \[2, 64, 64\]; only matrices"),
        (_state(shape=[64, 128]), r"is \[64, 128\] in the files, \[128, 64\] in the model"),
        (_state(quant_type="fp4"), "is not the JSON object of a weight of that type"),
        (_state(nested_offset=0.1), "nested_quant_map is missing"),
    ],
)
def test_what_cannot_be_taken_over_is_named(nf4: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises((SpecError, CheckpointError), match=message):
        import_bitsandbytes(changed(nf4, tmp_path / "changed", change))


def test_rows_that_are_no_whole_blocks_are_refused(four_bits: Callable[..., Path], tmp_path: Path) -> None:
    folder = four_bits(tiny(intermediate_size=96), tmp_path / "theirs")
    with pytest.raises(SpecError, match=r"layers\.\d\.mlp\.down_proj\.weight \[64, 96\] has blocks of 64 weights"):
        import_bitsandbytes(folder)


def test_a_matrix_that_has_no_layer_is_refused(nf4: Path, tmp_path: Path) -> None:
    def as_expert(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(UP)]:
            tensors[key.replace("mlp", "mlp.experts.0")] = tensors.pop(key)

    with pytest.raises(
        SpecError, match=r"experts\.0\.up_proj\.weight is in 4 bits, and LlamaForCausalLM has no linear"
    ):
        import_bitsandbytes(changed(nf4, tmp_path / "changed", as_expert))


def test_the_original_must_be_that_of_the_model(nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="only the original can tell"):
        import_bitsandbytes(nf4, rank=4)
    with pytest.raises(SpecError, match=r"down_proj\.weight is \[64, 128\] here, the original has it as \[32, 128\]"):
        import_bitsandbytes(nf4, tiny(hidden_size=32), rank=4)
    other = tiny()
    other.get_submodule(UP).weight.data.neg_()
    with pytest.raises(
        SpecError, match=r"up_proj\.weight of the original is not what was quantized: .* is -(0\.99|1\.00)"
    ):
        import_bitsandbytes(nf4, other, rank=4)
    tiny().save_pretrained(tmp_path / "plain")
    with pytest.raises(LRQError, match="is no model of bitsandbytes: its quant_method is None"):
        import_bitsandbytes(tmp_path / "plain")
    with pytest.raises((SpecError, CompressionError), match="would not get smaller with this rank"):
        import_bitsandbytes(nf4, tiny(), rank=64, factor_bits=16)


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_what_bitsandbytes_saves_and_loads(tmp_path: Path, kind: str, double: bool) -> None:
    tiny().save_pretrained(tmp_path / "original")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = import_bitsandbytes(tmp_path / "theirs")
    assert difference(logits(model), logits(theirs)) <= (2e-3 if double else 1e-6)
    export_bitsandbytes(model, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back.get_submodule(UP)).__name__ == "Linear4bit"
    assert torch.equal(back.get_submodule(UP).weight.data, theirs.get_submodule(UP).weight.data)
    assert difference(logits(back), logits(model)) <= 1e-6


@needs_bitsandbytes
def test_our_reading_is_theirs(four_bits: Callable[..., Path], tmp_path: Path) -> None:
    """The folders of these tests are such as bitsandbytes reads: it makes of them what we make of them."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tensors = load_file(four_bits(tiny(), tmp_path / "theirs", "nf4", True) / "model.safetensors")
    name = f"{UP}.weight"
    parts = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    theirs = dequantize_4bit(tensors[name], QuantState.from_dict(dict(parts), device="cpu"))
    ours = read_matrix(name, tensors).dequantize()
    assert (ours - theirs).abs().max() <= 2**-11 * theirs.abs().max()
