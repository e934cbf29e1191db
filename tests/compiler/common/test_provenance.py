"""provenance.json: a valid in-toto Statement that agrees with moec.json."""

import json
from pathlib import Path

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1.statement import Statement

from moec.compiler.common import provenance
from moec.compiler.common.artifact import MANIFEST, write_manifest
from moec.compiler.common.digest import sha256_of_file, sha256_of_text
from moec.compiler.common.errors import ArtifactError

SOURCE = {"config.json": sha256_of_text("config"), "model.safetensors": sha256_of_text("weights")}


def make(directory: Path, target: str = "onnx") -> Path:
    directory.mkdir()
    (directory / "model.onnx").write_bytes(b"model")
    content = {
        "source": {"digests": SOURCE},
        "recipe": {"target": target, "dtype": "fp32"},
        "tools": {"moec": "0.1.0", "onnx": "1.23.2"},
    }
    provenance.write(directory, write_manifest(directory, content))
    return directory


def test_it_is_a_statement_to_the_reader_of_in_toto(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    plain = json.loads((out / provenance.FILE).read_text())
    read = Statement.copy_from_pb(json_format.ParseDict(plain, Statement([], "", {}).pb))
    read.validate()
    subjects = {item.name: item.digest["sha256"] for item in read.pb.subject}
    assert subjects == {name: sha256_of_file(out / name) for name in ("model.onnx", MANIFEST)}
    assert read.pb.predicate_type == "https://slsa.dev/provenance/v1"


def test_the_predicate_is_a_provenance_without_unknown_fields(tmp_path: Path) -> None:
    plain = json.loads((make(tmp_path / "out") / provenance.FILE).read_text())
    # ParseDict refuses a field that the schema of SLSA does not have.
    read = json_format.ParseDict(plain["predicate"], provenance_pb2.Provenance())
    assert read.build_definition.build_type
    assert read.build_definition.external_parameters["recipe"]["target"] == "onnx"
    assert {item.name: item.digest["sha256"] for item in read.build_definition.resolved_dependencies} == SOURCE
    assert read.run_details.builder.id == "pkg:pypi/moec@0.1.0"
    assert read.run_details.builder.version["onnx"] == "1.23.2"


def test_it_is_the_same_on_every_build(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert (first / provenance.FILE).read_bytes() == (second / provenance.FILE).read_bytes()


def test_an_artifact_without_one_is_not_refused(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    assert provenance.check(out)
    (out / provenance.FILE).unlink()
    assert not provenance.check(out)


def test_that_of_another_artifact_is_refused(tmp_path: Path) -> None:
    out, other = make(tmp_path / "out"), make(tmp_path / "other", "tflite")
    (out / provenance.FILE).write_bytes((other / provenance.FILE).read_bytes())
    with pytest.raises(ArtifactError, match=r"does not describe this artifact") as caught:
        provenance.check(out)
    assert caught.value.exit_code == 9


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_one_is_refused(tmp_path: Path, content: str) -> None:
    out = make(tmp_path / "out")
    (out / provenance.FILE).write_text(content)
    with pytest.raises(ArtifactError, match=provenance.FILE):
        provenance.check(out)


def test_a_link_that_leads_out_of_the_artifact_is_refused(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    (out / provenance.FILE).rename(tmp_path / "elsewhere")
    (out / provenance.FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="leads out"):
        provenance.check(out)
