"""A checkpoint that was cut, altered or made to harm is refused by file and reason; nothing runs."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.errors import CheckpointError
from paceline.trainer.checkpoint import find_newest, is_checkpoint, load, read_manifest, save, tensors, verify
from paceline.trainer.checkpoint import load as load_function
from paceline.trainer.checkpoint.strict_json import write_json

FILES = ["manifest.json", "index.json", "state.json", "model.safetensors", "optimizer.safetensors", "state.safetensors"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    path = save(
        folder / "x",
        model={"w": torch.randn(4, 3), "b": torch.randn(3), "tied": torch.ones(2)},
        optimizer=[{"state": {"w": {"step": torch.tensor(1.0), "m": torch.randn(4, 3)}}}],
        state={"rng": torch.arange(50), "loops": {"t": (1, 2)}},
        meta={"global_step": 5, "epoch": 1},
    )
    return Path(path)


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "x.ckpt"))


def read_all(path: Path) -> None:
    loaded = load(path)
    loaded.model, loaded.optimizer, loaded.state


def sign(path: Path, record: dict[str, Any]) -> None:
    """Write a manifest with the checksum of its content, as an attacker would."""
    record = {key: value for key, value in record.items() if key != "crc32"}
    (path / "manifest.json").write_bytes(write_json({**record, "crc32": zlib.crc32(write_json(record))}))


def manifest_of(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
    return record


def replace(path: Path, name: str, data: bytes) -> None:
    """Put other content into a file, with a manifest that vouches for it."""
    (path / name).write_bytes(data)
    record = manifest_of(path)
    blocks = [zlib.crc32(data[i : i + 2**24]) for i in range(0, len(data), 2**24)]
    record["files"][name] = {"size": len(data), "block_bytes": 2**24, "crc32": blocks}
    sign(path, record)


def edit(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file, with a manifest that vouches for it."""
    record = json.loads((path / name).read_bytes())
    changed = change(record)
    replace(path, name, write_json(record if changed is None else changed))


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = manifest_of(path)
    change(record)
    sign(path, record)


def edit_header(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the header of the weights, with a manifest that vouches for it."""
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    record = json.loads(data[8 : 8 + length])
    changed = change(record)
    text = json.dumps(record if changed is None else changed).encode()
    replace(path, "model.safetensors", len(text).to_bytes(8, "little") + text + data[8 + length :])


def header_of(path: Path) -> dict[str, Any]:
    data = (path / "model.safetensors").read_bytes()
    record: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return record


def assert_refused(path: Path, name: str, reason: str) -> None:
    """Refused when loaded, reported by `verify`, passed over by `find_newest`: always by file and reason."""
    with pytest.raises(CheckpointError) as refusal:
        read_all(path)
    for text in (str(refusal.value), "\n".join(verify(path))):
        assert name in text and reason in text, text
    newest, skipped = find_newest([path.parent])
    assert newest is None and [found for found, _ in skipped] == [str(path)]


def test_the_example_is_whole(path: Path) -> None:
    read_all(path)
    assert verify(path) == []


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(path: Path, name: str) -> None:
    (path / name).unlink()
    assert_refused(path, name, "no manifest.json" if name == "manifest.json" else f"{name} is missing")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_cut_file_is_refused(path: Path, name: str, keep: float) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(len(data) * keep)])
    assert_refused(path, name, "JSON" if name == "manifest.json" else "cut")


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_any_one_bit_changed_is_refused(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    for position in range(0, len(data), max(1, len(data) // 40)):
        for bit in (0, 5):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            (path / name).write_bytes(changed)
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                read_all(path)
            assert verify(path)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_file_of_another_checkpoint_is_refused(path: Path, name: str, tmp_path: Path) -> None:
    state = {"rng": torch.zeros(50, dtype=torch.int64), "loops": {"t": (3, 4)}}
    model = {"w": torch.zeros(4, 3), "b": torch.zeros(3), "tied": torch.ones(3)}
    optimizer = [{"state": {"w": {"step": torch.tensor(2.0), "m": torch.zeros(4, 3)}}}]
    other = save(
        tmp_path / "other" / "y", model=model, optimizer=optimizer, state=state, meta={"global_step": 6, "epoch": 1}
    )
    shutil.copy(Path(other, name), path / name)
    assert_refused(path, name, "altered")


def test_an_extra_file_is_refused_and_a_hidden_one_of_the_system_is_not(path: Path) -> None:
    (path / ".DS_Store").write_text("")
    read_all(path)
    (path / "model-00002-of-00002.safetensors").write_bytes(b"stale")
    assert_refused(path, "model-00002-of-00002.safetensors", "is not in the manifest")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("write", [pickle.dumps, lambda value: torch_bytes(value)], ids=["pickle", "torch.save"])
def test_a_pickle_in_the_place_of_a_file_is_named_and_not_run(
    path: Path, name: str, write: Callable[[Any], bytes], tmp_path: Path
) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'harm'}",)

    data = write(Harm()) + b"\0" * 100
    if name == "manifest.json":
        (path / name).write_bytes(data)
    else:
        replace(path, name, data)
    assert_refused(path, name, "looks like a")
    assert not (tmp_path / "harm").exists()


def torch_bytes(value: Any) -> bytes:
    import io

    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_a_link_or_a_folder_in_the_place_of_a_file_is_refused(path: Path, name: str, tmp_path: Path) -> None:
    if name == "manifest.json":
        pytest.skip("the manifest may be a link: whoever follows it gets no file outside the folder")
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    assert_refused(path, name, "no plain file")
    (path / name).unlink()
    (path / name).mkdir()
    assert_refused(path, name, "no plain file")
    (path / name).rmdir()
    os.mkfifo(path / name)
    assert_refused(path, name, "no plain file")


MANIFESTS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("another version", lambda m: m.update(format_version=2), "version 2"),
    ("another format", lambda m: m.update(format="pickle"), "'pickle'"),
    ("a version that is a bool", lambda m: m.update(format_version=True), "format_version"),
    ("no step", lambda m: m.pop("global_step"), "global_step"),
    ("a negative step", lambda m: m.update(global_step=-1), "global_step"),
    ("an absurd step", lambda m: m.update(global_step=10**40), "global_step"),
    ("a step that is text", lambda m: m.update(global_step="5"), "global_step"),
    ("no time", lambda m: m.update(time="yesterday"), "yesterday"),
    ("files that are a list", lambda m: m.update(files=[]), "files"),
    ("a file that is text", lambda m: m["files"].update({"index.json": "x"}), "index.json"),
    ("a negative size", lambda m: m["files"]["index.json"].update(size=-5), "size"),
    ("an absurd size", lambda m: m["files"]["index.json"].update(size=2**70), "size"),
    ("a size that is a float", lambda m: m["files"]["index.json"].update(size=1e3), "size"),
    ("a large size", lambda m: m["files"]["index.json"].update(size=2**50), "checksums for"),
    ("tiny blocks", lambda m: m["files"]["index.json"].update(block_bytes=0), "blocks of 0"),
    ("huge blocks", lambda m: m["files"]["index.json"].update(block_bytes=2**40), "blocks of"),
    ("no checksums", lambda m: m["files"]["index.json"].update(crc32=[]), "0 checksums"),
    ("a checksum that is text", lambda m: m["files"]["index.json"].update(crc32=["x"]), "crc32"),
    ("no index", lambda m: m.update(indexes=[]), "no index"),
    ("an index not listed", lambda m: m.update(indexes=["other.json"]), "other.json"),
    ("an index that is a list", lambda m: m.update(indexes=[["index.json"]]), "does not list it"),
    ("no trees", lambda m: m["files"].pop("state.json"), "state.json"),
    ("meta with a tensor", lambda m: m["meta"].update(x={"$tensor": "w"}), "not in the checkpoint"),
    ("meta that is text", lambda m: m.update(meta="x"), "meta"),
    ("libraries that are a list", lambda m: m.update(libraries=[]), "libraries"),
    ("the manifest itself", lambda m: m["files"].update({"manifest.json": m["files"]["index.json"]}), "plain name"),
]
MANIFESTS += [
    (f"the name {name!r}", lambda m, name=name: m["files"].update({name: m["files"]["index.json"]}), "plain name")  # type: ignore[misc]
    for name in ("../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", ".hidden", "x\0y", "x\n", "~", "C:x", "x" * 300)
]


@pytest.mark.parametrize(("change", "reason"), [m[1:] for m in MANIFESTS], ids=[m[0] for m in MANIFESTS])
def test_a_manifest_that_no_save_writes_is_refused(path: Path, change: Callable[[Any], Any], reason: str) -> None:
    edit_manifest(path, change)
    assert_refused(path, "manifest.json", reason)
    assert not is_checkpoint(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'{"format": 1, "format": 2}', "twice"),
        (b'{"format": NaN}', "NaN"),
        (b"[" * 100_000, "JSON"),
        (b'{"a":' * 100_000, "JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b'{"a": "\x00"}', "JSON"),
    ],
)
def test_json_that_is_none_or_absurd_is_refused(path: Path, data: bytes, reason: str) -> None:
    (path / "manifest.json").write_bytes(data)
    assert_refused(path, "manifest.json", reason)


def test_a_manifest_of_absurd_size_is_refused_unread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(path / "manifest.json", "r+b") as file:
        file.truncate(2**40)  # a sparse file, which takes no space
    assert_refused(path, "manifest.json", str(2**40))


INDEXES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("a list", lambda i: [], "rank"),
    ("another rank", lambda i: i.update(rank=1), "rank 0 of 1"),
    ("more ranks", lambda i: i.update(ranks=2), "rank 0 of 1"),
    ("parts that are a list", lambda i: i.update(parts=[]), "parts"),
    ("a part that is text", lambda i: i["parts"].update(model="x"), "model"),
    ("a tensor that is text", lambda i: i["parts"]["model"].update(w="x"), "'w'"),
    ("another shape", lambda i: i["parts"]["model"]["w"].update(shape=[3, 4]), "'w'"),
    ("a negative shape", lambda i: i["parts"]["model"]["w"].update(shape=[-4, -3]), "'w'"),
    ("a huge shape", lambda i: i["parts"]["model"]["w"].update(shape=[2**40, 2**20]), "12 of its"),
    ("too many dimensions", lambda i: i["parts"]["model"]["w"].update(shape=[1] * 10_000), "10000 entries"),
    ("another dtype", lambda i: i["parts"]["model"]["w"].update(dtype="float64"), "model.safetensors"),
    ("an unknown dtype", lambda i: i["parts"]["model"]["w"].update(dtype="object"), "object"),
    ("no boxes", lambda i: i["parts"]["model"]["w"].update(boxes=[]), "0 of its 12"),
    ("a box that is text", lambda i: i["parts"]["model"]["w"].update(boxes=["x"]), "'w'"),
    ("a box twice", lambda i: i["parts"]["model"]["w"]["boxes"].append(i["parts"]["model"]["w"]["boxes"][0]), "24"),
    ("one box for two", lambda i: i["parts"]["model"].update(v=i["parts"]["model"]["w"]), "two boxes are 'w'"),
    ("a file not there", lambda i: i["parts"]["model"]["w"]["boxes"][0].update(file="other.safetensors"), "other"),
    ("a file outside", lambda i: i["parts"]["model"]["w"]["boxes"][0].update(file="../x.safetensors"), "../x"),
    ("a file of JSON", lambda i: i["parts"]["model"]["w"]["boxes"][0].update(file="state.json"), "state.json"),
    ("a key not there", lambda i: i["parts"]["model"]["w"]["boxes"][0].update(key="v"), "model.safetensors"),
    ("a box outside", lambda i: i["parts"]["model"]["w"]["boxes"][0].update(offset=[1, 0]), "outside"),
    ("an alias of nothing", lambda i: i["parts"]["model"].update(tied={"alias": "v"}), "alias of no tensor"),
    ("an alias of itself", lambda i: i["parts"]["model"].update(tied={"alias": "tied"}), "alias of no tensor"),
    ("an alias that is a number", lambda i: i["parts"]["model"].update(tied={"alias": 3}), "alias"),
    ("a tensor left out", lambda i: i["parts"]["state"].clear(), "rng"),
]


@pytest.mark.parametrize(("change", "reason"), [i[1:] for i in INDEXES], ids=[i[0] for i in INDEXES])
def test_an_index_that_no_save_writes_is_refused(path: Path, change: Callable[[Any], Any], reason: str) -> None:
    edit(path, "index.json", change)
    assert_refused(path, "", reason)


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ([], "no JSON object"),
        ({"extra": {}, "optimizer": None, "state": {"$tensor": "absent"}}, "absent"),
        ({"extra": [], "optimizer": None, "state": None}, "extra"),
        ({"extra": {"$tuple": []}, "optimizer": None, "state": None}, "extra"),
    ],
)
def test_trees_that_no_save_writes_are_refused(path: Path, tree: Any, reason: str) -> None:
    replace(path, "state.json", write_json(tree))
    with pytest.raises(CheckpointError, match=reason):
        read_all(path)


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("a list", lambda h: [], "no JSON object"),
    ("an entry that is text", lambda h: h.update(w="x"), "dtype"),
    ("an unknown dtype", lambda h: h["w"].update(dtype="O8"), "O8"),
    ("a shape too large", lambda h: h["w"].update(shape=[2**30, 3]), "cannot take"),
    ("a negative dimension", lambda h: h["w"].update(shape=[-4, -3]), "shape"),
    ("an absurd dimension", lambda h: h["w"].update(shape=[2**70, 0]), "shape"),
    ("a dimension that is a float", lambda h: h["w"].update(shape=[4.0, 3]), "shape"),
    ("too many dimensions", lambda h: h["w"].update(shape=[1] * 1000), "1000 entries"),
    ("offsets outside", lambda h: h["w"].update(data_offsets=[10**9, 10**9 + 48]), "gap or overlaps"),
    ("offsets before", lambda h: h["w"].update(data_offsets=[-48, 0]), "data_offsets"),
    ("offsets turned", lambda h: h["w"].update(data_offsets=[48, 0]), "cannot take"),
    ("one offset", lambda h: h["w"].update(data_offsets=[0]), "cannot take"),
    ("an overlap", lambda h: h.update(extra=entry("F32", [12], 0, 48)), "gap or overlaps"),
    ("bytes of no tensor", lambda h: (h.pop("tied"), None)[1], "its tensors end at"),
    ("a tensor of no index", lambda h: h.update(new=h.pop("tied")), "model.safetensors"),
]


@pytest.mark.parametrize(("change", "reason"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_a_header_that_no_save_writes_is_refused(path: Path, change: Callable[[Any], Any], reason: str) -> None:
    edit_header(path, change)
    assert_refused(path, "model.safetensors", reason)


def test_a_tensor_that_no_index_names_is_reported(path: Path) -> None:
    end = max(entry["data_offsets"][1] for entry in header_of(path).values() if "dtype" in entry)
    edit_header(path, lambda h: h.update(stray=entry("F32", [0], end, end)))
    assert "'stray', which no index names" in verify(path)[0]


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length_is_refused(path: Path, length: int) -> None:
    data = (path / "model.safetensors").read_bytes()
    replace(path, "model.safetensors", length.to_bytes(8, "little") + data[8:])
    assert_refused(path, "model.safetensors", "announce a header" if length > 1 else "header")


def test_a_safetensors_file_shorter_than_its_first_number_is_refused(path: Path) -> None:
    replace(path, "model.safetensors", b"\x01\x02")
    assert_refused(path, "model.safetensors", "2 bytes")


def test_no_tensor_is_made_that_the_files_could_not_fill(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the index and the header claim, memory is asked for only after the files proved to hold as much."""
    asked: list[int] = []
    real = torch.empty

    def empty(shape: Any, dtype: torch.dtype) -> torch.Tensor:
        asked.append(math.prod(shape) * dtype.itemsize)
        return real(shape, dtype=dtype)

    monkeypatch.setattr(tensors.torch, "empty", empty)
    read_all(path)
    assert sum(asked) <= sum(file.stat().st_size for file in path.iterdir())
    asked.clear()
    huge = {
        "dtype": "float32",
        "shape": [2**38],
        "boxes": [{"file": "model.safetensors", "key": "w", "offset": [0], "shape": [2**38]}],
    }
    edit(path, "index.json", lambda i: i["parts"]["model"].update(w=huge))
    with pytest.raises(CheckpointError):
        load_function(path).model
    edit_header(path, lambda h: h["w"].update(shape=[2**38], data_offsets=[0, 2**40]))
    with pytest.raises(CheckpointError):
        load_function(path).model
    assert asked == []


def test_a_file_that_is_no_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "lightning.ckpt")
    with pytest.raises(CheckpointError, match="is a file, and a checkpoint is a folder"):
        read_manifest(tmp_path / "lightning.ckpt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "absent.ckpt")
