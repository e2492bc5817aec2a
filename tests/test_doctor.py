"""What the machine can do, on one screen."""

import json

from tosa_convert.base import environment
from tosa_convert.export.self_test import try_export
from tosa_convert.workflows import doctor


def test_one_screen_says_what_there_is(tosa, monkeypatch):
    monkeypatch.setattr(doctor, "_compiler", lambda: ("works", ""))  # which takes long
    code, out, _ = tosa("doctor")
    assert code == 0
    assert len(out.splitlines()) <= 30
    for name in ("processor", "threads", "GPU", "runtimes", "export and INT8", "weights"):
        assert name in out
    assert "HF_HUB_OFFLINE is set" in out  # as it is in the tests


def test_what_does_not_work_is_said_and_the_rest_goes_on(tosa, monkeypatch):
    def broken():
        raise RuntimeError("no compiler\nanywhere")

    monkeypatch.setattr(doctor, "_compiler", broken)
    monkeypatch.setattr(doctor, "_export", lambda: ("work", ""))
    monkeypatch.setattr(environment, "instructions", lambda: ["avx2"])
    monkeypatch.setattr(doctor, "instructions", lambda: ["avx2"])
    code, out, _ = tosa("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["torch.compile"]["value"] == "does not work: no compiler anywhere"
    assert "no VNNI" in found["processor"]["advice"]


def test_the_layer_that_is_tried_is_quantised():
    found = try_export()
    assert found["difference"] < 1e-4
    assert 1e-3 < found["int8_error"] < 0.1


def test_models_in_a_cache_that_was_moved_are_counted(tmp_path, monkeypatch):
    (tmp_path / "models--someone--a-model").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "1 model in the cache" in doctor._weights()[0]
