"""Whoever gets a package can tell who made it, from what, and that it is whole; and loads nothing to find out."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_verify import CONFIG, GOOD, external, model, seal
from test_verify_script import script

from pipeline import cli, digest
from pipeline.artifact import CHECKSUMS, MANIFEST, PROVENANCE, SIGNATURE
from pipeline.documents import bom
from pipeline.errors import PackageError, UsageError
from pipeline.package import contents as package_files, provenance, signature, verify

pytest.importorskip("model_signing")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pipeline.package import signing

ROOT = Path(__file__).parent.parent
# Stands where the package's own replay is: whatever loads the package leaves a trace of it.
TRIPWIRE = """import pathlib, sys
def main(arguments):
    (pathlib.Path(arguments[0]).parent / "loaded").write_text("x")
    return 0
"""
SOURCE = {
    "base_model": "Qwen/Tiny",
    "license": "Apache-2.0",
    "languages": ["en"],
    "sha256": "ab" * 32,
    "locations": [
        {"type": "hub", "repo": "Qwen/Tiny-GGUF", "revision": "c" * 40, "file": "tiny.gguf"},
        {"type": "wheels", "wheels": [{"requirement": "some_part==1.0", "member": "a/b"}]},
    ],
}
TOLD = {
    "source": SOURCE,
    "recipe": {"quantize": {"algorithm": "none"}, "architecture": {"model_type": "qwen2"}},
    "steps": {"package": {"key": "12" * 32}, "checkpoint": {"key": "34" * 32, "digest": "56" * 32}},
    "tools": {"qwen-onnx": "0.1.0", "torch": "2.13.0+cpu", "onnxruntime-genai": "0.14.1"},
    "target": {"name": "cpu", "title": "processors", "provider": "CPUExecutionProvider", "validated_on": "CPU"},
    "runtime": {"name": "onnxruntime-genai", "minimum": "0.14.1"},
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path / "package")


def write_package(folder: Path) -> Path:
    """A package that tells when it is loaded; nothing of it is signed."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model(external("w", **GOOD)).SerializeToString())
    (folder / "model.onnx.data").write_bytes(bytes(range(64)))
    (folder / "genai_config.json").write_text(json.dumps(CONFIG))
    (folder / "LICENSE").write_text("do what you like")
    (folder / "replay.py").write_text(TRIPWIRE)
    seal(folder, **TOLD)
    return folder


def keys(folder: Path, name: str, key: Any = None, password: str = "") -> tuple[Path, Path]:
    """A private key that only its owner can read, and its public key."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    locked = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    private.chmod(0o600)
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return keys(tmp_path, "maker")


@pytest.fixture
def signed(package: Path, pair: tuple[Path, Path]) -> Path:
    signing.sign(package, pair[0], "urn:example:builder")
    return package


def _check_with_model_signing(package: Path, public: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(package)]
    command += ["--signature", str(package / SIGNATURE), "--public_key", str(public), "--no-ignore-git-paths"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_signed_package_verifies_here_and_with_the_tools_of_others(signed: Path, pair: tuple[Path, Path]) -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    assert verify.package(signed, key=pair[1]).data["name"] == "p"
    assert verify.package(signed).data["name"] == "p"
    done = _check_with_model_signing(signed, pair[1])
    assert done.returncode == 0, done.stdout + done.stderr

    data = json.loads((signed / PROVENANCE).read_bytes())
    key = serialization.load_pem_public_key(pair[1].read_bytes())
    name = data["signatures"][0]["keyid"]
    envelope = Envelope.from_dict(json.loads((signed / PROVENANCE).read_bytes()))
    envelope.verify([SSlibKey.from_crypto(key, keyid=name)], 1)  # type: ignore[arg-type]
    told = json.loads(envelope.payload)
    assert told["predicateType"] == "https://slsa.dev/provenance/v1"
    files = {path.name: digest.of_file(path) for path in signed.iterdir() if path.name not in (SIGNATURE, PROVENANCE)}
    assert {entry["name"]: entry["digest"]["sha256"] for entry in told["subject"]} == files
    build, run = told["predicate"]["buildDefinition"], told["predicate"]["runDetails"]
    uris = [entry.get("uri") for entry in build["resolvedDependencies"]]
    assert f"pkg:huggingface/Qwen/Tiny-GGUF@{'c' * 40}" in uris
    assert {"pkg:pypi/some-part@1.0", "pkg:pypi/torch@2.13.0%2Bcpu"} < set(uris)
    assert build["resolvedDependencies"][0]["digest"] == {"sha256": SOURCE["sha256"]}
    recipes = [entry["digest"]["sha256"] for entry in build["resolvedDependencies"] if entry["name"] == "recipe"]
    assert recipes == [digest.of_value(TOLD["recipe"])]
    assert build["internalParameters"]["steps"] == TOLD["steps"]
    assert run["builder"]["id"] == "urn:example:builder"


def test_a_key_is_asked_for_wherever_a_package_leaves_and_arrives(
    signed: Path, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger, archived, blobs = keys(tmp_path, "stranger")[1], tmp_path / "p.tar", tmp_path / "blobs"
    ways = {
        "packed": (["pack", str(signed), "-o", str(archived)], archived),
        "unpacked": (["unpack", str(archived), "-o", str(tmp_path / "unpacked")], tmp_path / "unpacked"),
        "exported": (["oci", "export", str(signed), str(blobs)], blobs),
        "imported": (["oci", "import", str(blobs), "-o", str(tmp_path / "imported")], tmp_path / "imported"),
    }
    for arguments, made in ways.values():
        assert cli.main([*arguments, "--key", str(stranger)]) == 9
        assert "was not signed with that key" in capsys.readouterr().err
        assert cli.main([*arguments, "--key", str(signed / "LICENSE")]) == 2
        assert "is no public key" in capsys.readouterr().err
        assert not made.exists()
        assert cli.main([*arguments, "--key", str(pair[1])]) == 0
    # What is at its place already is not taken for that of another.
    for way in ("unpacked", "imported"):
        assert cli.main([*ways[way][0], "--key", str(pair[1])]) == 0
        assert cli.main([*ways[way][0], "--key", str(stranger)]) == 9
    assert not list(tmp_path.glob(".*"))


def test_signing_again_replaces_both_and_a_damaged_package_is_not_signed(
    signed: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = keys(tmp_path, "other", ec.generate_private_key(ec.SECP384R1()))
    signing.sign(signed, other[0])
    verify.package(signed, key=other[1])
    with pytest.raises(PackageError, match="was not signed with that key"):
        verify.package(signed, key=pair[1])
    (signed / "LICENSE").write_text("something else")
    with pytest.raises(PackageError, match="is not the package that was built"):
        signing.sign(signed, pair[0])
    assert not (signed / SIGNATURE).exists()


def test_private_keys_are_handled_with_care(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys(tmp_path, "open")
    private.chmod(0o644)
    assert cli.main(["sign", str(package), "--key", str(private)]) == 2
    assert "others can read" in capsys.readouterr().err
    assert not (package / SIGNATURE).exists()

    locked = keys(tmp_path, "locked", password="a secret")
    monkeypatch.delenv(signing.PASSWORD, raising=False)
    with pytest.raises(UsageError) as caught:
        signing.sign(package, locked[0])
    assert "is not set" in caught.value.why
    monkeypatch.setenv(signing.PASSWORD, "another")
    with pytest.raises(UsageError, match="its password is another"):
        signing.sign(package, locked[0])
    monkeypatch.setenv(signing.PASSWORD, "a secret")
    signing.sign(package, locked[0])
    verify.package(package, key=locked[1])
    monkeypatch.delenv(signing.PASSWORD)

    for name, key in (
        ("rsa", rsa.generate_private_key(65537, 2048)),
        ("p521", ec.generate_private_key(ec.SECP521R1())),
    ):
        with pytest.raises(UsageError, match="is no key that signs packages"):
            signing.sign(package, keys(tmp_path, name, key)[0])
    public.chmod(0o600)
    with pytest.raises(UsageError, match="is no private key"):
        signing.sign(package, public)


def reseal(folder: Path, **changes: Any) -> None:
    """Make manifest and checksums fit what lies there, as somebody without the key would."""
    kept = {name: (folder / name).read_bytes() for name in (SIGNATURE, PROVENANCE) if (folder / name).is_file()}
    for name in kept:
        (folder / name).unlink()
    seal(folder, **TOLD, **changes)
    for name, data in kept.items():
        (folder / name).write_bytes(data)


def _flip(folder: Path) -> None:
    path = folder / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)


def _flip_and_reseal(folder: Path) -> None:
    _flip(folder)
    reseal(folder)


def _link(folder: Path) -> None:
    (folder / "LICENSE").rename(folder.parent / "elsewhere")
    (folder / "LICENSE").symlink_to(folder.parent / "elsewhere")


def _configure(folder: Path) -> None:
    decoder = {**CONFIG["model"]["decoder"], "custom_ops_library": "evil.so"}  # type: ignore[index,dict-item]
    config = {**CONFIG, "model": {**CONFIG["model"], "decoder": decoder}}  # type: ignore[dict-item]
    (folder / "genai_config.json").write_text(json.dumps(config))
    reseal(folder)


def _leave(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(model(external("w", **{**GOOD, "location": "../x"})).SerializeToString())
    reseal(folder)


def _strip(folder: Path) -> None:
    for name in (SIGNATURE, PROVENANCE):
        (folder / name).unlink()


def _change_signature(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        data = json.loads((folder / SIGNATURE).read_bytes())
        change(data)
        (folder / SIGNATURE).write_text(json.dumps(data))

    return run


def _rename_resource(data: dict[str, Any]) -> None:
    """Other words under an old signature."""
    envelope = data["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"]).replace(b'"LICENSE"', b'"LICENCE"')
    envelope["payload"] = base64.b64encode(payload).decode()


def _other_provenance(folder: Path) -> None:
    data = json.loads((folder / PROVENANCE).read_bytes())
    told = json.loads(base64.b64decode(data["payload"]))
    told["predicate"]["runDetails"]["builder"]["id"] = "urn:example:another"
    data["payload"] = base64.b64encode(json.dumps(told).encode()).decode()
    (folder / PROVENANCE).write_text(json.dumps(data))


# What is done to a package, whether it is signed again afterwards, and the code of what is found.
REJECTED: dict[str, tuple[Callable[[Path], Any], bool, str]] = {
    "bit flip": (_flip, False, "digests.changed"),
    "bit flip, manifest and checksums made to fit": (_flip_and_reseal, False, "digests.signature"),
    "extra file": (lambda p: (p / "extra.so").write_text("x"), False, "files.extra"),
    "extra file of git": (lambda p: (p / ".gitattributes").write_text("x"), False, "files.extra"),
    "extra file, in the manifest": (
        lambda p: ((p / "extra.so").write_text("x"), reseal(p)),
        False,
        "files.unsigned",
    ),
    "missing file": (lambda p: (p / "LICENSE").unlink(), False, "files.missing"),
    "missing file, not in the manifest": (
        lambda p: ((p / "LICENSE").unlink(), reseal(p)),
        False,
        "files.missing",
    ),
    "symlink": (_link, False, "files.special"),
    "case collision": (lambda p: (p / "license").write_text("x"), False, "files.case"),
    "custom_ops_library": (_configure, True, "configuration.untrusted"),
    "external data in ..": (_leave, True, "data.outside"),
    "wrong signature": (_change_signature(_rename_resource), False, "signature.wrong"),
    "signature of nothing": (lambda p: (p / SIGNATURE).write_text("{}"), False, "signature.malformed"),
    "signature that is a pipe": (
        lambda p: ((p / SIGNATURE).unlink(), os.mkfifo(p / SIGNATURE)),
        False,
        "signature.malformed",
    ),
    "signature with a certificate": (
        _change_signature(lambda data: data.update(verificationMaterial={"certificate": {}})),
        False,
        "signature.wrong",
    ),
    "two signatures": (
        _change_signature(lambda data: data["dsseEnvelope"]["signatures"].append({})),
        False,
        "signature.malformed",
    ),
    "provenance of somebody else": (_other_provenance, False, "signature.wrong"),
    "no provenance": (lambda p: (p / PROVENANCE).unlink(), False, "files.missing"),
    "unsigned": (_strip, False, "signature.missing"),
    "newer schema": (lambda p: reseal(p, schema_version=2), True, "manifest.version"),
}


def sign_anything(folder: Path, private: Path) -> None:
    """Sign as model-signing does, which looks at nothing."""
    (folder / PROVENANCE).unlink()
    signing._model_signing(folder, private, None, folder / SIGNATURE)


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_wrong_is_named_and_nothing_is_loaded(case: str, signed: Path, pair: tuple[Path, Path]) -> None:
    """The shipped script and the command refuse it alike, although both were asked to load and replay it."""
    tamper, again, code = REJECTED[case]
    tamper(signed)
    if again:
        sign_anything(signed, pair[0])
    exit_code, report = script(signed, "--key", str(pair[1]), "--replay")
    assert exit_code == 9, report
    assert not report["passed"]
    last = report["checks"][-1]
    assert last["state"] == "failed"
    assert code in last["codes"], last
    assert [check["state"] for check in report["checks"][:-1]] == ["passed"] * (len(report["checks"]) - 1)
    assert "runtime" not in [check["name"] for check in report["checks"]]
    assert not (signed.parent / "loaded").exists()
    here = verify.inspect(verify.Received(signed, pair[1]))
    assert here.as_dict()["checks"] == report["checks"]


def test_the_tripwire_would_have_shown_it(signed: Path, pair: tuple[Path, Path]) -> None:
    pytest.importorskip("onnxruntime_genai")
    code, report = script(signed, "--key", str(pair[1]), "--replay")
    assert (code, report["passed"]) == (0, True), report
    names = [check["name"] for check in report["checks"]]
    assert names == [
        *("signature", "files", "digests", "manifest", "configuration", "external data", "adapters"),
        *("runtime", "replay", "license"),
    ]
    assert (signed.parent / "loaded").exists()


def test_where_nothing_is_installed_all_but_the_load_is_checked(signed: Path, pair: tuple[Path, Path]) -> None:
    code, report = script(signed, "--key", str(pair[1]), site=False)
    assert code == 0, report
    states = {check["name"]: (check["state"], check["codes"]) for check in report["checks"]}
    assert states.pop("runtime") == ("unchecked", ["runtime.missing"])
    assert {state for state, _ in states.values()} == {"passed"}
    code, report = script(signed, "--replay", site=False)
    assert (code, report["checks"][-1]["codes"]) == (10, ["runtime.missing"])
    assert not (signed.parent / "loaded").exists()


def test_a_signature_that_nobody_checked_is_said_to_be_so(package: Path, pair: tuple[Path, Path]) -> None:
    def first() -> dict[str, Any]:
        found: dict[str, Any] = verify.inspect(verify.Received(package)).as_dict()["checks"][0]
        return found

    assert (first()["state"], first()["codes"]) == ("unchecked", ["signature.none"])
    signing.sign(package, pair[0])
    assert (first()["state"], first()["codes"]) == ("unchecked", ["signature.unchecked"])
    report = verify.inspect(verify.Received(package, package / "LICENSE"))
    assert report.error is not None
    assert (report.error.exit_code, report.checks[-1].codes) == (2, ("signature.key",))
    (package / SIGNATURE).unlink()  # a provenance that nobody signed for is a file like any other
    with pytest.raises(PackageError, match="is not the package that was built") as caught:
        verify.package(package)
    assert caught.value.codes == ("files.extra",)


def test_what_was_signed_with_the_other_tool_verifies_here(package: Path, pair: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(package), "--private_key", str(pair[0])]
    subprocess.run([*command, "--signature", str(package / SIGNATURE)], check=True, capture_output=True)
    report = verify.inspect(verify.Received(package, pair[1]))
    assert report.error is None
    assert "provenance" not in report.checks[0].text


VALIDATION = {"gates": [{"metric": "mean_kl", "path": "decode", "value": 0.018, "bound": 0.035, "sense": "max"}]}


@pytest.mark.parametrize("license_id", ["Apache-2.0", "qwen-research"])
def test_the_bill_of_materials_is_valid_to_the_letter_and_always_the_same(license_id: str) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    files = {"model.onnx": {"size": 1, "sha256": "cd" * 32}}
    manifest = {"name": "p", "files": files, **TOLD, "source": {**SOURCE, "license": license_id}}
    made = bom.document(manifest, VALIDATION)
    text = json.dumps(made)
    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert text == json.dumps(bom.document(manifest, VALIDATION))
    subject = made["metadata"]["component"]
    assert subject["type"] == "machine-learning-model"
    metric = subject["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]
    assert (metric["type"], metric["value"]) == ("mean_kl", "0.018")
    purls = {entry["purl"] for entry in made["components"]}
    assert {"pkg:pypi/torch@2.13.0%2Bcpu", f"pkg:huggingface/Qwen/Tiny-GGUF@{'c' * 40}"} <= purls
    refs = {subject["bom-ref"], *(entry["bom-ref"] for entry in made["components"])}
    assert {ref for entry in made["dependencies"] for ref in (entry["ref"], *entry.get("dependsOn", ()))} <= refs


def test_the_names_of_what_signing_adds_are_in_no_manifest(package: Path) -> None:
    """A manifest that lists the signature would make a package that nobody can sign."""
    assert not {SIGNATURE, PROVENANCE} & set(verify.package(package).files)
    sums = (package / CHECKSUMS).read_text()
    assert MANIFEST in sums
    assert SIGNATURE not in sums
    assert package_files.checksums({"b": "2", "a": "1"}) == b"1  a\n2  b\n"
    assert provenance.purl("pypi", "A_b", "1+c") == "pkg:pypi/a-b@1%2Bc"
    assert signature.pae("t", b"ab") == b"DSSEv1 1 t 2 ab"
