"""Packages as OCI artifacts: in layouts, and pushed to and pulled from a real registry (Debian's docker-registry)."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_package

from pipeline import cli, digest
from pipeline.errors import DownloadError, PackageError, UsageError
from pipeline.formats import oci_image, oci_layout
from pipeline.package import verify

# The password "secret" of the user "app".
_USERS = "app:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_package.write(tmp_path_factory.mktemp("package") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in another scheme: other weights, the same tokenizer."""
    return tiny_package.write(tmp_path_factory.mktemp("package") / "other", weights=b"x" * 40_000, name="tiny-cpu-int8")


def serve(folder: Path, users: bool = False) -> tuple[subprocess.Popen[bytes], str]:
    """Start a registry on a free port of this machine; returns its process and address."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed (apt-get install docker-registry)")
    pytest.importorskip("oras", reason="oras is not installed (pip install '.[oci]')")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {"version": 0.1, "log": {"level": "error"}, "http": {"addr": address}}
    config["storage"] = {"filesystem": {"rootdirectory": str(folder / "data")}}
    if users:
        (folder / "users").write_text(_USERS)
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(folder / "users")}}
    (folder / "config.yml").write_text(json.dumps(config))  # which is YAML, too
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://{address}/v2/", timeout=1).close()
            break
        except urllib.error.HTTPError:
            break
        except OSError:
            time.sleep(0.05)
    else:
        process.kill()
        pytest.fail(f"the registry did not start: {(folder / 'log').read_text()}")
    return process, address


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, address = serve(tmp_path_factory.mktemp("registry"))
    yield address
    process.terminate()
    process.wait()


def test_the_manifest_is_one_of_modelpack(package: Path, tmp_path: Path) -> None:
    """Types and keys are those of model-spec: specs-go/v1/mediatype.go and schema/config-schema.json."""
    image = oci_layout.write(package, tmp_path / "oci", "v1")
    manifest = json.loads(image.manifest)
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    kinds = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in manifest["layers"]}
    assert set(kinds) == {path.name for path in package.iterdir()}
    prefix = "application/vnd.cncf.model"
    assert kinds["model.onnx.data"] == kinds["model.onnx"] == f"{prefix}.weight.v1.raw"
    assert kinds["tokenizer.json"] == kinds["genai_config.json"] == f"{prefix}.weight.config.v1.raw"
    assert kinds["LICENSE"] == kinds["README.md"] == kinds["manifest.json"] == f"{prefix}.doc.v1.raw"
    assert (kinds["replay.py"], kinds["golden.jsonl"]) == (f"{prefix}.code.v1.raw", f"{prefix}.dataset.v1.raw")
    config = json.loads(oci_layout.path_of(tmp_path / "oci", image.config).read_bytes())
    assert config == {
        "descriptor": {
            "name": "tiny-cpu-int4",
            "family": "qwen2",
            "licenses": ["Apache-2.0"],
            "description": "Tiny",
        },
        "config": {
            "architecture": "transformer",
            "format": "onnx",
            "precision": "float32",
            "quantization": "gptq",
            "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"], "languages": ["en", "zh"]},
        },
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in manifest["layers"]]},
    }


def test_a_layout_has_what_image_layouts_have(package: Path, tmp_path: Path) -> None:
    layout = tmp_path / "oci"
    first = oci_layout.write(package, layout, "v1")
    assert oci_layout.write(package, layout, "v2").blob == first.blob
    assert json.loads((layout / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_bytes())
    assert [entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]] == ["v1", "v2"]
    assert {path.name for path in (layout / "blobs" / "sha256").iterdir()} == {
        digest.of_file(path) for path in (layout / "blobs" / "sha256").iterdir()
    }
    library = pytest.importorskip("oras.layout", reason="oras is not installed (pip install '.[oci]')")
    library.NewLayout(str(layout))  # another reader's own checks
    assert library.NewLayout(str(layout)).get_ordered_blobs("v1")[-1] == first.blob.digest


def test_two_schemes_share_what_is_equal(package: Path, other: Path, tmp_path: Path) -> None:
    images = [oci_layout.write(source, tmp_path / "oci", tag) for source, tag in ((package, "a"), (other, "b"))]
    names = [{layer.digest: layer.name for layer in image.layers} for image in images]
    shared = {names[0][blob] for blob in names[0].keys() & names[1].keys()}
    assert {path.name for path in package.iterdir()} - shared == {"model.onnx.data", "manifest.json", "SHA256SUMS"}


def test_what_was_exported_comes_back(package: Path, other: Path, tmp_path: Path) -> None:
    layout = tmp_path / "oci"
    assert cli.main(["oci", "export", str(package), str(layout), "--tag", "a"]) == 0
    assert cli.main(["oci", "import", str(layout), "-o", str(tmp_path / "out")]) == 0
    assert tiny_package.content(tmp_path / "out") == tiny_package.content(package)
    oci_layout.write(other, layout, "b")
    with pytest.raises(UsageError, match="single artifact"):
        oci_layout.read(layout)
    with pytest.raises(UsageError, match="holds something else"):
        oci_layout.extract(layout, oci_layout.read(layout, "b"), tmp_path / "out")
    oci_layout.extract(layout, oci_layout.read(layout, "a"), tmp_path / "out")  # the same is there already


def test_a_damaged_blob_is_found(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    image = oci_layout.write(copy, tmp_path / "oci", "a")
    weights = next(layer for layer in image.layers if layer.name == "model.onnx.data")
    path = oci_layout.path_of(tmp_path / "oci", weights)
    path.unlink()
    path.write_bytes(b"y" * weights.size)
    with pytest.raises(PackageError) as caught:
        oci_layout.extract(tmp_path / "oci", image, tmp_path / "out")
    assert "model.onnx.data" in str(caught.value)
    assert not (tmp_path / "out").exists()


def hostile(package: Path, tmp_path: Path) -> dict[str, tuple[dict[str, object], str]]:
    """Case → a manifest from elsewhere, and what is said of it."""
    good = json.loads(oci_layout.write(package, tmp_path / "oci", "a").manifest)

    def first(**changes: object) -> dict[str, object]:
        return {**good, "layers": [{**good["layers"][0], **changes}, *good["layers"][1:]]}

    def named(name: object) -> dict[str, object]:
        return first(annotations={"org.cncf.model.filepath": name})

    return {
        "the folder above": (named("../evil"), "is no file name"),
        "an absolute path": (named("/etc/passwd"), "is no file name"),
        "a name that is a number": (named(1), "is no file name"),
        "names that differ by case": (named("model.ONNX"), "where case does not count"),
        "a digest that is a path": (first(digest="sha256:../../evil"), "is no sha256 digest"),
        "another hash": (first(digest="md5:" + "0" * 32), "is no sha256 digest"),
        "a negative size": (first(size=-1), "no number of bytes"),
        "a huge size": (first(size=10**15), "or more than"),
        "a compressed layer": (first(mediaType="application/vnd.cncf.model.weight.v1.tar+gzip"), "only raw files"),
        "a container image": ({**good, "artifactType": "application/x"}, "no model"),
        "no layers": ({**good, "layers": []}, "it has no files"),
        "a layer without a name": (first(annotations={}), "org.cncf.model.filepath"),
    }


def test_a_hostile_manifest_is_refused(package: Path, tmp_path: Path) -> None:
    cases = hostile(package, tmp_path)
    for case, (manifest, text) in cases.items():
        with pytest.raises(PackageError) as caught:
            oci_image.parse(json.dumps(manifest).encode())
        assert text in str(caught.value), case
    for data in (b"{", b"[]", b"\xff", b"[" * 200_000):
        with pytest.raises(PackageError, match="the manifest is refused"):
            oci_image.parse(data)
    assert len(cases) == 12


@pytest.mark.parametrize(
    "reference", ["tiny", "tiny:v1", "host.example/UPPER:v1", "host.example/a/../b:v1", "h.x/a:v 1"]
)
def test_a_reference_is_checked_before_anything_is_asked(package: Path, reference: str) -> None:
    assert cli.main(["oci", "push", str(package), reference]) == 2


def test_pushed_and_pulled_through_a_registry(
    package: Path, other: Path, registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = sum(path.stat().st_size for path in package.iterdir())
    told = []
    for source, tag in ((package, "int4"), (other, "int8"), (package, "int4")):
        assert cli.main(["oci", "push", str(source), f"{registry}/models/tiny:{tag}", "--plain-http", "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    first, second, again = told
    assert first["digest"] == again["digest"] == oci_layout.write(package, tmp_path / "here", "x").blob.digest
    assert first["there"] == 0
    assert again["there"] == total
    differs = {"model.onnx.data", "manifest.json", "SHA256SUMS"}
    assert second["there"] == sum(path.stat().st_size for path in other.iterdir() if path.name not in differs)
    for tag, source, kept in (("int4", package, 0), ("int8", other, second["there"])):
        reference, out = f"{registry}/models/tiny:{tag}", tmp_path / "packages" / tag
        assert cli.main(["oci", "pull", reference, "-o", str(out), "--plain-http", "--json"]) == 0
        pulled = json.loads(capsys.readouterr().out)
        assert tiny_package.content(out) == tiny_package.content(source)
        assert pulled["there"] == kept
        assert pulled["artifact"] == (first if tag == "int4" else second)["digest"]
    pinned = f"{registry}/models/tiny@{first['digest']}"
    assert cli.main(["oci", "pull", pinned, "-o", str(tmp_path / "pinned"), "--plain-http"]) == 0
    assert tiny_package.content(tmp_path / "pinned") == tiny_package.content(package)


def test_nothing_is_fetched_that_is_not_signed_with_the_key(
    package: Path, registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("model_signing")
    from test_trust import keys

    from pipeline.formats import oci_registry
    from pipeline.package import signing

    signed = shutil.copytree(package, tmp_path / "signed")
    owner, stranger = keys(tmp_path, "owner"), keys(tmp_path, "stranger")
    signing.sign(signed, owner[0])
    weights = digest.of_file(package / "model.onnx.data")
    # What another artifact lists beside the signature of this one is not what was signed.
    image, _ = oci_image.describe(signed, verify.package(signed))
    for name, folder in (("plain", package), ("signed", signed)):
        oci_registry.push(folder, f"{registry}/models/trust:{name}", plain=True)
    client = oci_registry._Client(oci_registry._parsed(f"{registry}/models/trust:mixed"), True)
    shorter = json.loads(image.manifest)
    shorter["layers"] = [entry for entry in shorter["layers"] if entry["digest"] != f"sha256:{weights}"]
    client.put_manifest(oci_image.parse(json.dumps(shorter).encode()), "mixed")
    for name, public, problem in (
        ("plain", owner[1], "is not signed with that key"),
        ("signed", stranger[1], "is not signed with that key"),
        ("mixed", owner[1], "lists other files than were signed"),
    ):
        cache = tmp_path / f"cache-{name}"
        out = tmp_path / f"out-{name}"
        pulled = ["oci", "pull", f"{registry}/models/trust:{name}", "-o", str(out), "--plain-http"]
        assert cli.main([*pulled, "--cache", str(cache), "--key", str(public)]) == 9
        assert problem in capsys.readouterr().err
        assert not out.exists()
        assert not [path for path in (cache / "blobs" / "sha256").iterdir() if path.stat().st_size > 20_000]
    pulled = ["oci", "pull", f"{registry}/models/trust:signed", "-o", str(tmp_path / "good"), "--plain-http"]
    assert cli.main([*pulled, "--key", str(owner[1])]) == 0
    assert tiny_package.content(tmp_path / "good") == tiny_package.content(signed)


def test_a_pull_goes_on_where_it_was_cut_off(package: Path, registry: str, tmp_path: Path) -> None:
    from pipeline.formats import oci_registry

    reference = f"{registry}/models/cut:v1"
    oci_registry.push(package, reference, plain=True)
    cache = tmp_path / "cache"
    with oci_layout.changing(cache):
        name = digest.of_file(package / "model.onnx.data")
        data = (package / "model.onnx.data").read_bytes()
        (cache / "blobs" / "sha256" / f".{name}.part").write_bytes(data[:30_000])
    _, moved = oci_registry.pull(reference, cache, "v1", plain=True)
    whole = oci_registry.pull(reference, tmp_path / "fresh", "v1", plain=True)[1]
    assert whole.moved - moved.moved == 30_000
    (cache / "blobs" / "sha256" / name).write_bytes(b"damaged")
    assert oci_registry.pull(reference, cache, "v1", plain=True)[1].moved > len(data)


def test_wrong_bytes_of_the_right_size_are_refused(package: Path, tmp_path: Path) -> None:
    from pipeline.formats import oci_registry

    process, address = serve(tmp_path)
    try:
        oci_registry.push(package, f"{address}/tiny:v1", plain=True)
        name = digest.of_file(package / "tokenizer.json")
        blob = tmp_path / "data" / "docker" / "registry" / "v2" / "blobs" / "sha256" / name[:2] / name / "data"
        blob.write_bytes(b"x" * blob.stat().st_size)
        with pytest.raises(PackageError, match="sends other bytes"):
            oci_registry.pull(f"{address}/tiny:v1", tmp_path / "cache", "v1", plain=True)
        with pytest.raises(DownloadError, match="does not answer"):
            oci_registry.pull(f"{address}/absent:v1", tmp_path / "cache", "v1", plain=True)
    finally:
        process.terminate()
        process.wait()
    with pytest.raises(DownloadError, match="cannot be reached"):
        oci_registry.pull(f"{address}/tiny:v1", tmp_path / "cache", "v1", plain=True)


def test_a_registry_that_wants_users_to_sign_in(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.formats import oci_registry

    process, address = serve(tmp_path, users=True)
    try:
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(DownloadError) as caught:
            oci_registry.push(package, f"{address}/tiny:v1", plain=True)
        assert "sign in" in str(caught.value)
        (tmp_path / ".docker").mkdir()
        known = {"auths": {address: {"auth": base64.b64encode(b"app:secret").decode()}}}
        (tmp_path / ".docker" / "config.json").write_text(json.dumps(known))
        pushed = oci_registry.push(package, f"{address}/tiny:v1", plain=True)
        assert oci_registry.pull(f"{address}/tiny:v1", tmp_path / "cache", "v1", plain=True)[1].digest == pushed.digest
    finally:
        process.terminate()
        process.wait()
