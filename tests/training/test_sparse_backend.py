"""Which backend a run gets: packed where it is possible and saves memory, hook elsewhere."""

import copy

import bitsandbytes
import pytest
import torch
from tiny import tiny_args
from transformers import Trainer

from lori_trl.training.parallel_engines import Engine
from lori_trl.training.sparse_backend import choose_backend

ADAMW = (torch.optim.AdamW, {"lr": 1e-3})
ONE = Engine("one device", 1)


def choose(args, engine=ONE, density=0.1, *, calibrate=True, optimizer=ADAMW):
    return choose_backend(args, engine, density, calibrate=calibrate, optimizer=optimizer)


@pytest.fixture
def args(tmp_path):
    return tiny_args(tmp_path / "out")


@pytest.mark.parametrize(
    ("engine", "calibrate", "backend"),
    [
        (Engine("one device", 1), True, "packed"),
        (Engine("DDP", 8), True, "packed"),
        (Engine("ZeRO-2", 8), True, "packed"),
        (Engine("ZeRO-3", 8), False, "hook"),
        (Engine("FSDP2", 8), True, "hook"),
        (Engine("FSDP2", 8), False, "packed"),
        (Engine("FSDP2", 64), False, "hook"),  # its positions are whole on every device: they would take more
    ],
    ids=lambda value: f"{value.name} on {value.devices}" if isinstance(value, Engine) else None,
)
def test_the_engine_decides(args, engine, calibrate, backend):
    assert choose(args, engine, calibrate=calibrate)[0] == backend


@pytest.mark.parametrize(("density", "backend"), [(1.0, "packed"), (0.9, "hook"), (0.55, "hook"), (0.5, "packed")])
def test_packed_must_save(args, density, backend):
    """24 bytes a packed entry against 13 of every one: below 13/24."""
    assert choose(args, density=density)[0] == backend


class Rowwise(torch.optim.Optimizer):
    """Scales each row's step by the row's norm."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                norm = parameter.grad.norm(dim=-1, keepdim=True) + 1e-8
                parameter.data -= group["lr"] * parameter.grad / norm


class Needy(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("no device of mine is here")


BY_CLASS = {
    "hook": [
        (Rowwise, {"lr": 1e-3}),
        (Needy, {"lr": 1e-3}),
        (torch.optim.AdamW, {"lr": 1e-3, "params": []}),
        (torch.optim.LBFGS, {"lr": 1.0}),
    ],
    "packed": [
        ADAMW,
        (torch.optim.NAdam, {}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.SGD, {"lr": 1e-6, "momentum": 0.9, "nesterov": True}),
        (bitsandbytes.optim.Lion32bit, {"lr": 1e-5}),
    ],
}


@pytest.mark.parametrize(
    ("optimizer", "backend"),
    [(optimizer, backend) for backend, optimizers in BY_CLASS.items() for optimizer in optimizers],
    ids=lambda value: value[0].__name__ if isinstance(value, tuple) else None,
)
def test_the_optimizer_decides(args, optimizer, backend):
    assert choose(args, optimizer=optimizer)[0] == backend


@pytest.mark.parametrize(
    ("optim", "backend"),
    [
        ("adamw_torch", "packed"),
        ("adamw_torch_fused", "packed"),
        ("adamw_8bit", "packed"),
        ("paged_adamw_8bit", "packed"),
        ("ademamix", "packed"),
        ("lion_32bit", "packed"),
        ("rmsprop", "packed"),
        ("adagrad", "packed"),
        ("sgd", "packed"),
        ("adafactor", "hook"),
    ],
)
def test_the_trainers_own_optimizers(args, tmp_path, optim, backend):
    args = tiny_args(tmp_path / "out", optim=optim, weight_decay=0.1)
    assert choose(args, optimizer=Trainer.get_optimizer_cls_and_kwargs(args))[0] == backend


def test_an_optimizer_that_moves_what_has_no_gradient_is_refused(args, tmp_path):
    """Muon makes a step's directions orthogonal, over the whole matrix. Where all of B is trained, it may."""
    muon = (torch.optim.Muon, {"lr": 1e-3})
    for backend in ("auto", "packed", "hook"):
        with pytest.raises(ValueError, match="The optimizer Muon moves entries that have no gradient.*`sparsity=0`"):
            choose(tiny_args(tmp_path / "out", sparse_backend=backend), optimizer=muon)
    assert choose(args, density=1.0, optimizer=muon) == ("packed", "all of B is trained")


def test_packed_that_is_asked_for_with_a_rowwise_optimizer_gives_a_warning(tmp_path, caplog):
    asked = tiny_args(tmp_path / "out", sparse_backend="packed")
    assert choose(asked)[0] == "packed" and not caplog.text
    assert choose(asked, optimizer=(Rowwise, {"lr": 1e-3}))[0] == "packed"
    assert "`sparse_backend='packed'` with Rowwise" in caplog.text and "Leave `sparse_backend` unset" in caplog.text


def test_vllm_is_sent_no_packed_values(args, tmp_path):
    rollouts = copy.copy(args)
    rollouts.use_vllm = True
    assert choose(rollouts)[0] == "hook"
    rollouts.sparse_backend = "packed"
    with pytest.raises(ValueError, match="`use_vllm=True`.*Allowed with it is 'hook'"):
        choose(rollouts)


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "packed"),
        ({"optim": "adafactor"}, "hook"),
        ({"sparse_backend": "hook"}, "hook"),
        ({"sparsity": 0.3}, "hook"),
    ],
)
def test_a_run_tells_its_backend_in_log_and_record(make_trainer, caplog, changes, backend):
    with caplog.at_level("INFO", logger="lori_trl"):
        trainer = make_trainer(max_steps=1, calibration_max_steps=1, **changes)
    assert f"`sparse_backend` is {backend!r}: " in caplog.text
    trainer.train()
    assert trainer.record.training.hyperparameters["sparse_backend"] == backend


def test_adafactor_trains_as_the_papers_way_does(make_trainer, tmp_path):
    """Packed, it differed by 0.13 where B's largest entry was 0.04."""
    trained = {}
    for backend in ("auto", "hook"):
        trainer = make_trainer(
            output_dir=tmp_path / backend, optim="adafactor", sparse_backend=backend, max_steps=8, learning_rate=1e-2
        )
        trainer.train()
        trained[backend] = trainer.weights
    assert all(torch.equal(weight, trained["hook"][path]) for path, weight in trained["auto"].items())
