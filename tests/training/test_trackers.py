"""Every phase is a run of its own in every tracker, named after it, with its own arguments."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback, integration_utils

RATES = {"calibration": 1e-3, "adaptation": 5e-3}


def make_tracked(make_trainer, **changes):
    rates = {"calibration_learning_rate": RATES["calibration"], "learning_rate": RATES["adaptation"]}
    return make_trainer(max_steps=2, calibration_max_steps=1, **rates, **changes)


def test_tensorboard_shows_two_runs_in_one_place(make_trainer, tmp_path):
    make_tracked(make_trainer, report_to="tensorboard").train()
    files = sorted((tmp_path / "out").rglob("events.out.*"))
    assert [file.parent.parent for file in files] == [tmp_path / "out" / "runs"] * 2
    names = [file.parent.name for file in files]
    assert [name.rpartition("-")[2] for name in names] == ["adaptation", "calibration"]
    assert len({name.rpartition("-")[0] for name in names}) == 1
    for file, phase, loss in zip(files, sorted(RATES), ("train/loss", "train/calibration_loss"), strict=True):
        events = EventAccumulator(str(file)).Reload()
        arguments = events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
        assert f'"learning_rate": {RATES[phase]}' in arguments
        assert [event.step for event in events.Scalars(loss)] == ([1, 2] if phase == "adaptation" else [1])


def test_a_run_without_a_calibration_is_named_as_ever(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    make_tracked(make_trainer, report_to="tensorboard", sparsity=0.0).train()
    assert [file.parent for file in tmp_path.rglob("events.out.*")] == [tmp_path / "logs"]


def test_a_users_own_writer_is_left_alone(make_trainer):
    tags = []
    writer = SimpleNamespace(add_text=lambda *_: None, flush=lambda: None, close=lambda: None)
    writer.add_scalar = lambda tag, *_: tags.append(tag)
    own = TensorBoardCallback(writer)
    own.on_train_end = lambda *_, **__: None
    make_tracked(make_trainer, callbacks=[own]).train()
    assert {"train/calibration_loss", "train/loss"} <= set(tags)


class Recorded:
    """What a tracker's module was told: a run has a name, parameters and metrics."""

    def __init__(self):
        self.runs: list[SimpleNamespace] = []
        self.active: SimpleNamespace | None = None

    def begin(self, name):
        self.active = SimpleNamespace(name=name, parameters={}, metrics=set(), config=None, summary={})
        self.active._label = lambda **_: None
        self.runs.append(self.active)

    def end(self):
        self.active = None

    def set_parameters(self, values, **_):
        assert not [name for name, value in values.items() if self.active.parameters.get(name, value) != value]
        self.active.parameters |= values

    def log(self, metrics, **_):
        self.active.metrics |= metrics.keys()


class Config(dict):
    def __init__(self, recorded):
        self.update = recorded.set_parameters


def mlflow_module(recorded) -> ModuleType:
    module = ModuleType("mlflow")
    module.__version__ = "3.0.0"
    module.__spec__ = ModuleSpec("mlflow", None)  # transformers asks for it, to know what is installed
    module.utils = SimpleNamespace(
        validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=1000)
    )
    module.is_tracking_uri_set, module.get_tracking_uri = lambda: True, lambda: "here"
    run = SimpleNamespace(info=SimpleNamespace(run_id="1"))
    module.active_run = lambda: None if recorded.active is None else run
    module.start_run = lambda run_name, nested: recorded.begin(run_name)
    module.end_run, module.log_params, module.log_metrics = recorded.end, recorded.set_parameters, recorded.log
    return module


def trackio_module(recorded) -> ModuleType:
    module = ModuleType("trackio")
    module.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    module.init = lambda name, **_: recorded.begin(name)
    module.config, module.log, module.finish = Config(recorded), recorded.log, recorded.end
    return module


class WandbModule(ModuleType):
    recorded: Recorded
    run = property(lambda self: self.recorded.active)


def wandb_module(recorded) -> ModuleType:
    module = WandbModule("wandb")
    module.recorded = recorded
    module.init = lambda project, name=None: recorded.begin(name)
    module.config, module.log, module.finish = Config(recorded), recorded.log, recorded.end
    return module


MODULES = {"mlflow": mlflow_module, "trackio": trackio_module, "wandb": wandb_module}


@pytest.fixture
def recorded(request, monkeypatch) -> Recorded:
    """Stand in for a tracker, whose name is the parameter."""
    name, recorded = request.param, Recorded()
    monkeypatch.setitem(sys.modules, name, MODULES[name](recorded))
    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    if name == "wandb":
        errors = ModuleType("wandb.sdk.lib.config_util")
        errors.ConfigError = KeyError
        for module in ("wandb.sdk", "wandb.sdk.lib"):
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        monkeypatch.setitem(sys.modules, errors.__name__, errors)
    return recorded


@pytest.mark.parametrize("recorded", MODULES, indirect=True)
def test_every_phase_is_a_run_with_its_parameters(recorded, request, make_trainer):
    tracker = request.node.callspec.params["recorded"]
    make_tracked(make_trainer, report_to=tracker, run_name="mine").train()
    assert [run.name for run in recorded.runs] == ["mine-calibration", "mine-adaptation"]
    for run, phase in zip(recorded.runs, RATES, strict=True):
        assert run.parameters["learning_rate"] == RATES[phase]
        has_loss = {name.rpartition("/")[2] for name in run.metrics} & {"loss", "calibration_loss"}
        assert has_loss == {"loss" if phase == "adaptation" else "calibration_loss"}


@pytest.mark.parametrize("recorded", ["mlflow", "wandb"], indirect=True)
def test_a_run_that_the_user_began_has_both_phases(recorded, request, make_trainer):
    recorded.begin("the user's")
    make_tracked(make_trainer, report_to=request.node.callspec.params["recorded"]).train()
    (run,) = recorded.runs
    assert recorded.active is run
    assert run.parameters["learning_rate"] == RATES["adaptation"]
    assert run.parameters["calibration_learning_rate"] == RATES["calibration"]
    assert {"calibration_loss", "loss"} <= {name.rpartition("/")[2] for name in run.metrics}
