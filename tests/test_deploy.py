"""The programs of docs/deploy.md, run as they stand there, each on one exported file: all see the same in a photo."""

import functools
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from tosa_convert import ExportSettings, convert, export_onnx, load
from tosa_convert.data.images import built_in_scenes

DOC = (Path(__file__).parent.parent / "docs" / "deploy.md").read_text()
PROGRAMS = dict(re.findall(r"^```(python|py|cpp|cmake|html)\n(.*?)^```", DOC, re.M | re.S))
WEB = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


@pytest.fixture(scope="module", params=["float32", "int8"])
def shipped(request, tmp_path_factory) -> Path:
    """An exported folder, and a photo of the model's size in it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = convert(load("quickstart"), score="similarity", bypass="merge", layers=[4, 5, 6, 7], ratio=0.6, segment=[4])
    export_onnx(model, folder, None, ExportSettings(raw_input=True, precision=request.param, min_agreement=0.5))
    Image.open(built_in_scenes()[0]).convert("L").resize((28, 28), Image.BICUBIC).save(folder / "photo.png")
    return folder


def expected(folder: Path) -> tuple[int, float]:
    """The class that ONNX Runtime finds here, and its probability."""
    pixels = np.asarray(Image.open(folder / "photo.png"), dtype=np.uint8).reshape(1, 28, 28, 1)
    found = onnxruntime.InferenceSession(str(folder / "model.onnx")).run(["probabilities"], {"images": pixels})[0][0]
    return int(found.argmax()), float(found.max())


def check(printed: str, folder: Path, tolerance: float) -> None:
    best, probability = printed.split()
    wanted, wanted_probability = expected(folder)
    assert int(best) == wanted
    assert float(probability) == pytest.approx(wanted_probability, abs=tolerance)


@pytest.mark.long
def test_python(shipped, tmp_path):
    program = tmp_path / "classify.py"
    program.write_text(PROGRAMS["python"])
    command = [sys.executable, str(program), str(shipped), str(shipped / "photo.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    check(done.stdout, shipped, 1e-6)


@pytest.mark.long
def test_python_without_raw_input(tmp_path):
    export_onnx(convert(load("quickstart"), layers=[2], ratio=0.5), tmp_path)
    program = tmp_path / "run.py"
    program.write_text(PROGRAMS["py"])
    command = [sys.executable, str(program), str(tmp_path), str(built_in_scenes()[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "'logits': (1, 10)" in done.stdout


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="needs cmake and g++")
def test_cpp(shipped, tmp_path):
    openvino = pytest.importorskip("openvino")
    (tmp_path / "classify.cpp").write_text(PROGRAMS["cpp"])
    (tmp_path / "CMakeLists.txt").write_text(PROGRAMS["cmake"])
    place = Path(openvino.__file__).parent / "cmake"
    for command in (["cmake", "-S", ".", "-B", "build", f"-DOpenVINO_DIR={place}"], ["cmake", "--build", "build"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "pixels").write_bytes(np.asarray(Image.open(shipped / "photo.png"), dtype=np.uint8).tobytes())
    command = [str(tmp_path / "build" / "classify"), str(shipped / "model.onnx"), str(tmp_path / "pixels")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    check(done.stdout, shipped, 0.02)


class Quiet(SimpleHTTPRequestHandler):
    def guess_type(self, path):
        known = {".mjs": "text/javascript", ".wasm": "application/wasm"}
        return known.get(Path(path).suffix) or super().guess_type(path)

    def log_message(self, *_):
        pass


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("npm")), reason="needs chromium and npm")
def test_browser(shipped, tmp_path):
    packed = subprocess.run(
        ["npm", "pack", "onnxruntime-web"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if packed.returncode:
        pytest.skip("onnxruntime-web cannot be fetched from npm")
    shutil.unpack_archive(tmp_path / packed.stdout.split()[-1], tmp_path)
    site = tmp_path / "site"
    shutil.copytree(shipped, site)
    for name in WEB:
        shutil.copy(tmp_path / "package" / "dist" / name, site)
    (site / "index.html").write_text(PROGRAMS["html"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    address = f"http://127.0.0.1:{server.server_port}/index.html"
    command = ["chromium", *options, "--virtual-time-budget=60000", "--dump-dom", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    finally:
        server.shutdown()
    check(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1], shipped, 0.02)
