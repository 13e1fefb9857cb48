"""The base model: from safetensors, never from a pickle."""

import shutil

import pytest
from tiny import model_folder

from lori_trl.evaluation.models import load_model
from lori_trl.training.base_model import load_base_model


@pytest.mark.parametrize("load", [load_base_model, load_model])
def test_a_pickle_is_left_alone_and_the_way_out_is_told(load, tmp_path):
    base = shutil.copytree(model_folder(), tmp_path / "pickled")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s/ran'\ntR." % bytes(tmp_path))
    with pytest.raises(FileNotFoundError, match="are left alone.*convert them once.*pass that folder"):
        load(str(base))
    assert not (tmp_path / "ran").exists()


def test_safetensors_are_read():
    assert load_base_model(str(model_folder())).num_parameters() == load_model(str(model_folder()))[0].num_parameters()
