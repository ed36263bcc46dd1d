"""One of two processes that train a small compressed model with the Trainer, under DDP and FSDP2.

Run by test_distributed_trainer.py, which sets the variables that torchrun sets, as
`python distributed_run.py <compressed model> <folder for results>`. Each run leaves what it trained in a file.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_lrq

STEPS = 4
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


class Sequences(torch.utils.data.Dataset):
    """Sixteen sequences of twelve tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 128, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.clone()}


def adapted(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return peft.get_peft_model(model, hf_lrq.LRQAdapterConfig(task_type="CAUSAL_LM"))


def bare(folder: Path) -> Any:
    """The factors themselves, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hf_lrq.refit_factors(model)  # Codes cannot be trained in place.
    for name, parameter in model.named_parameters():
        if name.endswith(("lr_L", "lr_R")):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(name.endswith(("lr_L", "lr_R")))
    return model


def train(model: Any, folder: Path, batch: int, resume: str | None = None, **options: Any) -> Trainer:
    """STEPS steps of `batch` sequences in each process."""
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.05,  # Half of what it is: clipping takes part.
        "optim": "riemannian_adamw",
        "optim_args": "precond=two_sided",
        **options,
    }
    args = TrainingArguments(output_dir=str(folder), **arguments)
    if args.fsdp:
        # accelerate passes over FSDP where there is no accelerator, and trains with DDP. Told that there are some, it
        # does everything as it would there, on the device that it has.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    runner = Trainer(model=model, args=args, train_dataset=Sequences())
    runner.train(resume_from_checkpoint=resume)
    return runner


def trained(model: Any) -> dict[str, Tensor]:
    """Whole values of what was trained."""
    values = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            value = p.detach()
            values[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone().contiguous()
    return values


def main(compressed: Path, out: Path) -> None:
    """All runs."""
    torch.set_num_threads(1)
    hf_lrq.register_optimizers()
    found: dict[str, Any] = {}

    def run(name: str, model: Any, **options: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        runner = train(model, out / name, batch=2, **options)
        values = trained(model)  # Gathered by both.
        found[name] = {
            "parameter": type(next(p for p in model.parameters() if p.requires_grad)).__name__,
            "optimizer": type(runner.optimizer.optimizer).__name__,
        }
        if dist.get_rank() == 0:
            save_file(values, out / f"{name}.safetensors")

    for wrapper, options in (("ddp", {}), ("fsdp2", FSDP2)):
        run(f"{wrapper} adapter", adapted(compressed), save_strategy="steps", save_steps=2, **options)
        half = out / f"{wrapper} adapter" / "checkpoint-2"
        run(f"{wrapper} resumed", adapted(compressed), resume=str(half), **options)
        run(f"{wrapper} bare", bare(compressed), **options)
    print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)  # See tests/optim/distributed_run.py.


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
