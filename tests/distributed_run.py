"""What test_distributed.py starts on two ranks: `torchrun --nproc_per_node 2 distributed_run.py CASE FOLDER`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from tiny import lora_config, make_llama, make_trainer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from lori_trl import LoriMasks
from lori_trl.layers import lora_layers
from lori_trl.projections import init_projections
from lori_trl.selection import select_largest
from lori_trl.sparse import refresh_values, sparse_training


def same_everywhere(tensor: torch.Tensor) -> bool:
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.contiguous())
    return all(torch.equal(tensor, other) for other in others)


def ddp(folder: Path) -> None:
    """The whole method under DDP."""
    trainer = make_trainer(
        folder / "out",
        per_device_train_batch_size=2,  # the one process takes 4
        ddp_backend="gloo",
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    assert dist.get_world_size() == 2
    for path, weight in trainer.weights.items():
        assert same_everywhere(trainer.masks[path].byte()) and same_everywhere(weight.detach())
    trainer.save_model()


def selection(folder: Path) -> None:
    """Sharded selection equals that of the whole tensors: ties, zeros, exclusion and uneven rows."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        whole = {f"m{i}": torch.randint(-3, 4, (5 + i, 3), generator=generator).float() for i in range(4)}
        exclude = {name: torch.rand(t.shape, generator=generator) < 0.2 for name, t in whole.items()}
        k = int(torch.randint(1, 60, (), generator=generator))
        sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}
        expected, expected_threshold = select_largest(whole, k, exclude)
        masks, threshold = select_largest(sharded, k, exclude)
        assert threshold == expected_threshold
        assert all(torch.equal(masks[name], expected[name]) for name in whole), (seed, k)


def fsdp2(folder: Path) -> None:
    """Packed layers under `fully_shard`: the same loss and gradients, and a gathered adapter that is whole."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    tokens = torch.arange(3, 63).view(4, 15)

    def build():
        model = get_peft_model(make_llama(), lora_config())
        init_projections(model, "default", seed=1)
        torch.manual_seed(0)
        for layer in lora_layers(model, "default").values():
            layer.lora_B["default"].weight.data.normal_(std=0.1)
        return model

    def train(model, batches):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
        losses = []
        for batch in batches:
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    whole = build()
    start = {path: layer.lora_B["default"].weight.clone() for path, layer in lora_layers(whole, "default").items()}
    generator = torch.Generator().manual_seed(0)
    masks = LoriMasks.select({path: torch.rand(B.shape, generator=generator) for path, B in start.items()}, 0.7)
    with sparse_training(whole, "default", masks):
        expected_losses = train(whole, [tokens] * 4)
    expected = {path: layer.lora_B["default"].weight for path, layer in lora_layers(whole, "default").items()}

    sharded = build()
    with sparse_training(sharded, "default", masks):
        for layer in sharded.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        mine = tokens.chunk(2)[dist.get_rank()]
        losses = train(sharded, [mine] * 4)
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / 2, expected_losses, rtol=1e-5, atol=1e-5)
        state = sharded.state_dict()  # folds the values into the shards of B
        gathered = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in state.items()
            if "lora_" in name or "sparse" in name
        }
        assert len(gathered) == 28 and not any("sparse" in name for name in gathered)
        for path, B in expected.items():
            got = gathered[f"base_model.model.{path}.lora_B.default.weight"]
            assert got.shape == B.shape
            torch.testing.assert_close(got, B.detach(), rtol=1e-4, atol=1e-5)
            assert torch.equal(got[~masks[path]], start[path][~masks[path]])
        for layer in lora_layers(sharded, "default").values():
            layer.lora_B["default"].weight.to_local().fill_(0.25)
        refresh_values(sharded, "default")
        for layer in lora_layers(sharded, "default").values():
            variant = layer.lora_variant["default"]
            assert not variant.packed or (layer.sparse_values["default"].full_tensor() == 0.25).all()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "ddp":
        ddp(Path(sys.argv[2]))
    else:
        {"selection": selection, "fsdp2": fsdp2}[sys.argv[1]](Path(sys.argv[2]))
    dist.barrier()
    if dist.get_rank() == 0:
        Path(sys.argv[2], "passed").touch()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the interpreter
