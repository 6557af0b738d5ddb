"""Published weights: their records, and fetching them from a server that misbehaves."""

import hashlib
import http.server
import inspect
import io
import json
import pickle
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from holofunc import models, random
from holofunc.models import weights
from holofunc.models.download import DownloadError, download
from holofunc.models.preprocess import Preprocess

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from holocron.models import classification
    from holocron.models.checkpoints import Checkpoint
    from holocron.models.presets import IMAGENET

MODEL = models.resnet18()
PARAMS, BUFFERS = MODEL.init(random.key(7))


def as_published(values):
    """The bytes of a file in the format of the releases: torch's old one, not a zip archive."""
    file = io.BytesIO()
    torch.save(values, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


FILE = as_published({**PARAMS, **BUFFERS})
SHA256 = hashlib.sha256(FILE).hexdigest()


@contextmanager
def serving(handler):
    """The address of a server on this machine."""
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def server():
    """A local server; the path says how it behaves. ``server.requests`` counts."""
    server = SimpleNamespace(requests=0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            if self.path.startswith("/gone/"):
                self.send_error(404)
                return
            if self.path.startswith("/chunks/"):  # of unknown number, and the last one never comes
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % len(FILE) + FILE[:1000])
                return
            body = b"<!DOCTYPE html><html>please log in</html>" if self.path.startswith("/page/") else FILE
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path.startswith("/broken/") else body)

        def log_message(self, *_):
            pass

    with serving(Handler) as url:
        server.url = url
        yield server


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub/checkpoints"


def equal(actual, expected):
    return actual.keys() == expected.keys() and all(torch.equal(actual[n], expected[n]) for n in expected)


# --- records -----------------------------------------------------------------------------------------------------


def holocrons():
    """Its checkpoints, by constructor and member."""
    kinds = [kind for kind in vars(classification).values() if isinstance(kind, type) and issubclass(kind, Enum)]
    return {(m.value.meta.arch, m.name): m.value for kind in kinds for m in kind if isinstance(m.value, Checkpoint)}


def test_records_are_holocrons():
    ours, theirs = {(w.constructor, w.member): w for w in weights.checkpoints()}, holocrons()
    assert (len(theirs), len(ours)) == (31, 39)  # and 8 early releases
    assert set(theirs) <= set(ours)
    for name, record in theirs.items():
        w, meta, images = ours[name], record.meta, record.pre_processing
        assert (w.url, w.sha256, w.num_params) == (meta.url, meta.sha256, meta.num_params)
        assert w.categories == tuple(meta.categories) or w.dataset == "imagenet-1k"
        assert w.num_classes == len(w.categories) == len(meta.categories)
        assert (w.mean, w.std, w.interpolation) == (tuple(images.mean), tuple(images.std), images.interpolation.value)
        assert (3, w.input_size, w.input_size) == tuple(images.input_shape)
        assert w.metrics == {k[:4].replace("-", ""): v for k, v in record.evaluation.results.items()}
        assert w.dataset == record.evaluation.dataset
        if record.recipe.args:
            assert w.recipe == {
                "commit": record.recipe.commit,
                "script": record.recipe.script,
                "args": record.recipe.args,
            }
        else:
            assert w.recipe is None
        assert w.size == meta.size or meta.size == 14351299  # one file's, stated of four others too
    assert ours["rexnet1_0x", "IMAGENET1K"].categories[0] == IMAGENET.classes[0]


@pytest.mark.parametrize("w", weights.checkpoints(), ids=lambda w: w.name)
def test_records_agree_with_the_models_they_are_of(w):
    model = models.create(w.constructor, num_classes=w.num_classes)
    assert sum(p.numel() for p in model.skeleton.parameters()) == w.num_params
    stored = sum(v.numel() * v.element_size() for v in model.skeleton.state_dict().values())
    assert w.size is None or 1 < w.size / stored < 1.04
    assert w.url.endswith((".pth", ".pt"))
    assert w.sha256.startswith(w.url.rpartition("-")[2].partition(".")[0])
    assert len(w.sha256) == (8 if "early release" in w.note else 64)
    assert set(w.metrics) == (set() if "early release" in w.note else {"top1", "top5"})
    assert len(w.categories) == w.num_classes
    assert w.licence == "Apache-2.0"
    assert w.recipe is None or (w.constructor in w.recipe["args"] and len(w.recipe["commit"]) == 40)


def test_each_model_with_weights_has_one_default():
    for name in models.list_models(pretrained=True):
        assert sum(w.default for w in weights.checkpoints(name)) == 1


def test_preprocessing_is_theirs_at_validation():
    preprocess = weights.checkpoints("resnet18")[0].transforms()
    assert (preprocess.resize_size, preprocess.input_size) == (232, 224)
    image = torch.full((3, 300, 400), 255, dtype=torch.uint8)
    out = preprocess(image)
    torch.testing.assert_close(out[:, 0, 0], (1 - torch.tensor(preprocess.mean)) / torch.tensor(preprocess.std))
    torch.testing.assert_close(preprocess(torch.stack([image, image])), torch.stack([out, out]))
    torch.testing.assert_close(preprocess(Image.new("L", (400, 300), 255)), out)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(37, 51), (64, 40), (33, 33)])
def test_preprocessing_equals_torchvisions(mode, size):
    ours = Preprocess(29, 24, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), mode)
    theirs = ImageClassification(
        crop_size=24, resize_size=29, mean=ours.mean, std=ours.std, interpolation=InterpolationMode(mode)
    )
    image = random.randint(random.key(0), (3, *size), 0, 256).to(torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    torch.testing.assert_close(ours(picture), theirs(picture), rtol=0, atol=1e-6)
    level = 1.01 / 255 / min(ours.std)  # torchvision may resize in integers
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=level)
    torch.testing.assert_close(ours(image / 255), theirs(image / 255), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p(torch.zeros(1, 30, 30)), ValueError, r"image must have shape \(3, H, W\)"),
        (
            lambda p: p(torch.zeros(3, 30, 30, dtype=torch.int64)),
            TypeError,
            "must be uint8 or floating point, got torch.int64",
        ),
        (lambda p: p([[0]]), TypeError, "must be a tensor or a PIL image, got list"),
        (lambda p: replace(p, input_size=300), ValueError, "1 <= input_size <= resize_size, got 300, 232"),
        (lambda p: replace(p, interpolation="cubic"), ValueError, "must be 'bilinear' or 'bicubic', got 'cubic'"),
        (lambda p: replace(p, std=(1.0,)), ValueError, "one number per channel"),
    ],
)
def test_preprocessing_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(weights.checkpoints("resnet18")[0].transforms())


# --- loading -----------------------------------------------------------------------------------------------------


def test_loaded_at_init_from_a_file(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(FILE)
    for source in (path, str(path)):
        params, buffers = models.resnet18(weights=source).init(random.key(0))
        assert equal(params, PARAMS)
        assert equal(buffers, BUFFERS)
    params, _ = models.resnet18(weights=path).init(random.key(0), dtype=torch.bfloat16)
    assert params["head.weight"].dtype == torch.bfloat16
    assert models.resnet18(weights=path).init(random.key(0), device="meta")[0]["head.weight"].is_meta


def test_a_file_of_a_record_is_verified(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(FILE)
    record = weights.Weights("resnet18", "mine", str(path), sha256=hashlib.sha256(FILE).hexdigest())
    assert equal(models.resnet18(weights=record).init(random.key(0))[0], PARAMS)
    with pytest.raises(DownloadError, match="is another file: its sha256 is"):
        models.resnet18(weights=replace(record, sha256="0" * 64))


@pytest.mark.parametrize("name", models.list_models())
def test_every_constructor_takes_weights(name, tmp_path, monkeypatch):
    """Holocron's own ignored them for resnet34, mobileone_s0 and others, and started at random without a word."""
    (tmp_path / "w.pth").touch()
    there = models.create(name).skeleton.state_dict()
    monkeypatch.setattr(weights, "read", lambda path: dict(there))
    params, buffers = models.create(name, weights=tmp_path / "w.pth").init(random.key(0), device="meta")
    loaded = params | buffers
    assert loaded.keys() == there.keys()
    assert all(loaded[n] is there[n] for n in there)


def test_a_training_runs_file_and_safetensors(tmp_path):
    torch.save({"epoch": 3, "model": {**PARAMS, **BUFFERS}}, tmp_path / "run.pt")
    assert equal(models.resnet18(weights=tmp_path / "run.pt").init(random.key(0))[0], PARAMS)
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({**PARAMS, **BUFFERS}, tmp_path / "weights.safetensors")
    assert equal(models.resnet18(weights=tmp_path / "weights.safetensors").init(random.key(0))[0], PARAMS)


def test_a_member_is_fetched_once_and_verified(server, hub, monkeypatch):
    member = weights.Weights("resnet18", "TEST", f"{server.url}/ok/resnet18-{SHA256[:8]}.pth", SHA256, num_classes=10)
    monkeypatch.setattr(weights, "checkpoints", lambda constructor=None: (member,))
    for name in (member, "TEST", "resnet18.test"):
        model = models.resnet18(weights=name)
        assert equal(model.init(random.key(0))[0], PARAMS)
    assert server.requests == 1
    (file,) = hub.iterdir()
    assert file.name == f"resnet18-{SHA256[:8]}.pth"
    file.write_bytes(FILE[:-1] + bytes([FILE[-1] ^ 1]))  # damaged on disk: noticed, and fetched again
    models.resnet18(weights=member)
    assert server.requests == 2


def test_classes_that_differ_need_a_new_head(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(FILE)
    with pytest.raises(ValueError, match=r"has 10 classes|have 10 classes.*pass num_classes=10, or new_head=True"):
        models.resnet18(num_classes=37, weights=path)
    model = models.resnet18(num_classes=37, weights=path, new_head=True)
    params, _ = model.init(random.key(1))
    assert params["head.weight"].shape == (37, 512)
    assert torch.equal(params["head.weight"], models.resnet18(num_classes=37).init(random.key(1))[0]["head.weight"])
    assert equal(
        {n: p for n, p in params.items() if n[:4] != "head"}, {n: p for n, p in PARAMS.items() if n[:4] != "head"}
    )


def test_features_of_loaded_models_are_loaded(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(FILE)
    assert equal(models.features(models.resnet18(weights=path), [1]).init(random.key(0))[0], PARAMS)


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        (
            "resnet18",
            "IMAGENET1K",
            ValueError,
            r"resnet18 has no such checkpoint \('IMAGENETTE'\), and there is no such",
        ),
        ("resnet101", "DEFAULT", ValueError, r"resnet101 has no such checkpoint \(none\)"),
        ("sknet101", "IMAGENETTE", ValueError, r"sknet101 has no such checkpoint \(none\)"),
        ("resnet18", "", ValueError, "there is no such file"),
        ("resnet18", True, TypeError, "weights must be one of models.weights.checkpoints.*got True"),
        ("resnet18", weights.checkpoints("resnet34")[0], ValueError, "are weights of resnet34, not of resnet18"),
    ],
)
def test_what_is_no_weights(name, given, error, message):
    with pytest.raises(error, match=message):
        models.create(name, weights=given)


def test_weights_of_another_architecture_are_refused_in_one_message(tmp_path):
    torch.save({**PARAMS, **BUFFERS}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"values do not fit resnet34: missing: .*features.4.2.*features.7.2"):
        models.resnet34(weights=tmp_path / "w.pt")


# --- files that are not what they should be ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "sha256", "message"),
    [
        ("gone/a.pth", ..., "the server answered 404"),
        ("broken/a.pth", ..., "the connection ended after .* of .* bytes"),
        ("chunks/a.pth", ..., "IncompleteRead"),
        ("page/a.pth", ..., "sent a web page: its sha256 is .*, expected"),
        ("page/a.pth", None, "sent a web page, not weights"),
        ("ok/a.pth", "0" * 64, "sent another file: its sha256 is .*, expected 0000"),
        ("ok/resnet18-00000000.pth", None, r"expected 00000000 \(from its name\)"),
    ],
)
def test_failed_downloads_leave_nothing(server, hub, path, sha256, message):
    with pytest.raises(DownloadError, match=message):
        download(f"{server.url}/{path}", SHA256 if sha256 is ... else sha256)
    assert not hub.exists() or list(hub.iterdir()) == []


def test_nobody_answers(hub):
    with serving(http.server.BaseHTTPRequestHandler) as url:
        pass
    with pytest.raises(DownloadError, match="refused"):
        models.resnet18(weights=f"{url}/a-{SHA256[:8]}.pth")


def test_a_bar_is_shown_where_it_is_asked_for_and_on_terminals(server, hub, capsys):
    for place, progress in (("a", None), ("b", False)):
        download(f"{server.url}/{place}/weights.pth", progress=progress)
    assert capsys.readouterr().err == ""
    download(f"{server.url}/c/weights.pth", progress=True)
    assert "weights.pth: 100%" in capsys.readouterr().err


def test_files_of_one_name_from_two_places_are_two(server, hub):
    first, second = (download(f"{server.url}/{place}/weights.pth") for place in ("a", "b"))
    assert first != second
    assert first.read_bytes() == FILE


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"w": Evil()}), "cannot be read safely"),
        (b"<html>", "cannot be read safely"),
        (as_published({"lr": 0.1}), "must hold a state dict, tensors by name"),
        (as_published([torch.zeros(2)]), "must hold a state dict, tensors by name, got list"),
    ],
)
def test_files_without_weights(tmp_path, capsys, content, message):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        weights.read(tmp_path / "w.pth")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff" * 100])
def test_safetensors_that_are_none(tmp_path, content):
    pytest.importorskip("safetensors")
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read safely"):
        weights.read(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError):
        weights.read(tmp_path / "none.safetensors")


def test_extras_that_are_not_installed_are_named(tmp_path, monkeypatch):
    for package in ("huggingface_hub", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"from_hub needs huggingface_hub: pip install 'holofunc\[hub\]'"):
        weights.from_hub("someone/resnet18", revision="a" * 40)
    about = weights.Weights("resnet18", "mine", "", class_names=("a", "b"))
    with pytest.raises(ImportError, match=r"to_hub needs huggingface_hub: pip install 'holofunc\[hub\]'"):
        weights.to_hub(weights.to_folder(tmp_path, about, PARAMS, BUFFERS), "someone/resnet18")
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(ImportError, match=r"needs safetensors: pip install 'holofunc\[hub\]'"):
        models.resnet18(weights=tmp_path / "w.safetensors")


# --- the hub -----------------------------------------------------------------------------------------------------


REVISION = "a" * 40


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder served as the hub serves the repository ``someone/resnet18`` at one revision."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    folder = tmp_path / "repository"
    folder.mkdir()
    config = {"arch": "resnet18", "classes": list("abcdefghij"), "input_shape": [3, 160, 160]}
    config |= {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (folder / "config.json").write_text(json.dumps(config))

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            place, _, name = self.path.rpartition("/")
            known = place == f"/someone/resnet18/resolve/{REVISION}" and (folder / name).is_file()
            body = (folder / name).read_bytes() if known else b""
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header(*(("ETag", f'"{hashlib.sha256(body).hexdigest()}"') if known else NO_ENTRY))
            self.end_headers()
            return body

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.wfile.write(self.answer())

        def log_message(self, *_):
            pass

    with serving(Handler) as url:
        yield folder, url


NO_ENTRY = ("X-Error-Code", "EntryNotFound")


@pytest.mark.parametrize(
    "files", [("model.safetensors",), ("pytorch_model.bin",), ("pytorch_model.bin", "model.safetensors")]
)
def test_repositories_of_the_hub(repository, files):
    folder, url = repository
    other = {n: v + 1 for n, v in {**PARAMS, **BUFFERS}.items()}
    if "pytorch_model.bin" in files:
        torch.save(other if len(files) > 1 else {**PARAMS, **BUFFERS}, folder / "pytorch_model.bin")
    if "model.safetensors" in files:
        pytest.importorskip("safetensors.torch").save_file({**PARAMS, **BUFFERS}, folder / "model.safetensors")
    w = weights.from_hub("someone/resnet18", revision=REVISION, endpoint=url)
    assert w.categories == tuple("abcdefghij")
    assert w.transforms() == Preprocess(160, 160, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model = models.create(w.constructor, **w.options())
    assert equal(model.init(random.key(0))[0], PARAMS)


def test_repositories_that_are_not_in_holocrons_layout(repository):
    _, url = repository
    with pytest.raises(ValueError, match="revision must be the 40 digits of a commit hash, got 'main'"):
        weights.from_hub("someone/resnet18", revision="main", endpoint=url)
    with pytest.raises(ValueError, match=r"someone/resnet18 has neither model.safetensors nor pytorch_model.bin"):
        weights.from_hub("someone/resnet18", revision=REVISION, endpoint=url)


def test_repositories_without_their_configuration(repository):
    folder, url = repository
    (folder / "config.json").write_text('{"input_shape": [3, 160, 160], "mean": [0.5], "std": [0.5]}')
    with pytest.raises(ValueError, match=r"config.json of someone/resnet18 has no arch, classes"):
        weights.from_hub("someone/resnet18", revision=REVISION, endpoint=url)


def test_a_folder_is_published_and_read_again(repository, tmp_path, monkeypatch):
    folder, url = repository
    about = weights.Weights(
        "resnet18", "mine", "", dataset="pets", metrics={"top1": 0.913}, mean=(0.5,) * 3, std=(0.25,) * 3,
        input_size=160, licence="MIT", class_names=tuple("abcdefghij"),
    )  # fmt: skip
    weights.to_folder(folder, about, PARAMS, BUFFERS, card="Ten kinds of pets.")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: holofunc\n")
    assert "Ten kinds of pets." in card
    assert "| top1 | 91.30% |" in card
    for w in (weights.from_hub("someone/resnet18", revision=REVISION, endpoint=url), weights.from_folder(folder)):
        assert w.categories == tuple("abcdefghij")
        assert w.transforms() == Preprocess(160, 160, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        params, buffers = models.create(w.constructor, **w.options()).init(random.key(0))
        assert equal(params, PARAMS)
        assert equal(buffers, BUFFERS)
    with pytest.raises(ValueError, match=r"weights must have class_names, got none for resnet18\.mine"):
        weights.to_folder(folder, replace(about, class_names=()), PARAMS, BUFFERS)


def test_a_folder_is_uploaded_as_it_is(repository, monkeypatch):
    folder, url = repository
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls, Real = [], huggingface_hub.HfApi

    class Api:
        """Takes what the real one takes."""

        def __init__(self, **options):
            calls.append(inspect.signature(Real).bind(**options).arguments)

        def create_repo(self, *args, **options):
            calls.append(inspect.signature(Real.create_repo).bind(self, *args, **options).arguments)

        def upload_folder(self, **options):
            calls.append(inspect.signature(Real.upload_folder).bind(self, **options).arguments)
            return huggingface_hub.CommitInfo(f"https://huggingface.co/a/b/commit/{REVISION}", "", "", oid=REVISION)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(ValueError, match=r"repository has neither model\.safetensors nor pytorch_model\.bin"):
        weights.to_hub(folder, "someone/resnet18", endpoint=url)
    assert not calls
    torch.save({**PARAMS, **BUFFERS}, folder / "pytorch_model.bin")
    assert weights.to_hub(folder, "someone/resnet18", endpoint=url, token="t", private=True) == REVISION
    assert [{name: x for name, x in call.items() if name != "self"} for call in calls] == [
        {"endpoint": url, "token": "t"},
        {"repo_id": "someone/resnet18", "private": True, "exist_ok": True},
        {"repo_id": "someone/resnet18", "folder_path": str(folder)},
    ]
