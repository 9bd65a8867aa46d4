"""Rice's code of quantised tokens: exact for any codes, refused where damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import zarr
from torch import Tensor

from pipeline.storage.npz import npy_header
from pipeline.store import Store
from pipeline.store.arrays import TRIMMED_HEADER, trimmed_header
from pipeline.store.checksums import extend
from pipeline.store.codecs import (
    decode_column,
    encode_column,
    find_codec,
    part_name,
    relayout,
    same_numbers,
)
from pipeline.store.codecs.rice import RicePerToken, impossible_headers, pack, unpack
from pipeline.store.reading.file_source import FileSource
from pipeline.store.reading.stream_reader import DamagedShardError, StreamReader
from pipeline.store.writer import Values
from schemas.networks import TeacherInfo
from schemas.store import Manifest
from schemas.streams import Column
from tests.bench.synthetic_stores import LATENT, StoreSpec, make_manifest, write_store
from tests.stores import TEACHER

T, W = 5, 12


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def normal(shape: tuple[int, ...]) -> Tensor:
    scale = 2 ** (14 * torch.rand(*shape[:2], 1, generator=rng()))
    return (torch.randn(shape, generator=rng()) * scale).round().clamp(-32000, 32000)


def rare(shape: tuple[int, ...]) -> Tensor:
    loud = torch.rand(shape, generator=rng()) < 0.02
    return torch.randint(-32000, 32001, shape, generator=rng()) * loud


KINDS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "zeros": torch.zeros,
    "normal, each token of another spread": normal,
    "any": lambda shape: torch.randint(-32000, 32001, shape, generator=rng()),
    "a few loud ones": rare,
    "the largest": lambda shape: torch.full(shape, 32000),
    "the smallest": lambda shape: torch.full(shape, -32000),
    "one loud token": lambda shape: torch.arange(shape[1]).eq(2)[:, None].expand(shape) * -3000,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 3, 8, 33, 257])
def test_any_codes_come_back(kind: str, width: int) -> None:
    codes = KINDS[kind]((3, T, width)).int()
    packed = pack(codes)
    assert packed.shape == (3, *RicePerToken(23, True).arrays((T, width))[""].shape)
    assert torch.equal(unpack(packed, T, width), codes)
    assert not impossible_headers(packed.numpy(), np.arange(3), T, width).any()


def test_bytes_are_those_of_the_format() -> None:
    """One token, b = 2: the low bit of the magnitude above the sign; zeros, then a one."""
    codes = torch.tensor([[[0, -1, 3, -4, 5, -8, 1, 2]]])
    low = [0, 1, 2, 3, 2, 3, 2, 0]  # (magnitude & 1) * 2 + sign
    fixed = sum(value << 2 * i for i, value in enumerate(low)).to_bytes(2, "little")
    unary = int("".join("0" * (m >> 1) + "1" for m in [0, 0, 3, 3, 5, 7, 1, 2])[::-1], 2)
    expected = (((2 - 1) << 12) + 2).to_bytes(2, "little") + fixed + unary.to_bytes(2, "little")
    assert bytes(pack(codes)[0].tolist()).rstrip(b"\0") == expected


def test_normal_numbers_take_little_more_than_their_entropy() -> None:
    codes = (torch.randn(2, 16, 768, generator=rng()) * 23).round()
    stored = len(bytes(pack(codes)[0].tolist()).rstrip(b"\0")) * 8 / (16 * 768)
    assert np.log2(23) + 2.047 < stored < np.log2(23) + 2.047 + 0.17


@pytest.mark.parametrize("levels", [1, 9, 23, 999])
def test_numbers_are_those_of_the_other_layout(levels: int) -> None:
    values = torch.randn(2, T, W, generator=rng()) * 3 + torch.randn(W, generator=rng())
    values[0, 1] *= 100
    values[1, 2] = 0
    columns = [Column(shape=(T, W), codec=f"{kind}{levels}") for kind in ("tokens", "rice")]
    stored = [encode_column("x", column, values) for column in columns]
    decoded = [decode_column("x", c, s) for c, s in zip(columns, stored, strict=True)]
    assert torch.equal(*decoded)
    for old, new in ((0, 1), (1, 0)):
        moved = relayout("x", columns[old], columns[new], stored[old])
        assert moved.keys() == stored[new].keys()
        assert all(torch.equal(moved[part], stored[new][part]) for part in moved)


def test_only_equal_levels_are_the_same_numbers() -> None:
    assert same_numbers("tokens23", "rice23")
    assert same_numbers("float16", "float16")
    for other in ("rice22", "rms23", "tokens24", "int8"):
        assert not same_numbers("rice23", other)


def test_whatever_the_bytes_are_no_others_are_read() -> None:
    size = RicePerToken(23, True).arrays((T, W))[""].shape[0]
    noise = torch.randint(0, 256, (200, size), dtype=torch.uint8, generator=rng())
    assert unpack(noise, T, W).shape == (200, T, W)  # an index outside would raise
    unpack(torch.full_like(noise, 255), T, W)


def test_impossible_headers_are_seen() -> None:
    packed = pack(torch.zeros(4, T, W)).numpy()
    packed[1, 0:2] = 0xFF  # b = 16 with a unary string
    packed[2, 3] = 0  # b = 1, and 2 bytes too few
    packed[2, 2] = 0
    packed[3, : 2 * T] = 0xF0  # fits no sample
    found = impossible_headers(packed, np.array([0, 1, 2, 3]), T, W)
    assert found.tolist() == [False, True, True, True]


def test_compiled_as_one_graph_it_gives_the_same() -> None:
    codec = find_codec("rice23")
    stored = codec.encode(torch.randn(2, T, W, generator=rng()))
    compiled = torch.compile(codec.decode, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(compiled(stored), codec.decode(stored))


@pytest.mark.parametrize("count", [0, 1, 9, 10, 99999, 1 << 24])
def test_header_is_the_one_that_numpy_writes(count: int) -> None:
    assert trimmed_header(1 << 24, TRIMMED_HEADER + count) == npy_header((count,))


@pytest.mark.parametrize("size", [0, TRIMMED_HEADER - 1, TRIMMED_HEADER + 101])
def test_sizes_of_no_sample_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="at most 228 fit"):
        trimmed_header(100, size)


def loud_samples(manifest: Manifest) -> list[Values]:
    """Samples of each kind, and so of quite different lengths."""
    name, stream = manifest.teacher_stream()
    column = stream.columns["tokens"]
    samples = []
    for number, make in enumerate(KINDS.values()):
        arrays = RicePerToken(23, True).encode(torch.randn(1, *column.shape, generator=rng()))
        arrays[""] = pack(make((1, *column.shape)))
        parts = {part_name("tokens", part): tensor[0].numpy() for part, tensor in arrays.items()}
        latents = {part: np.full(LATENT, number) for part in ("mean", "std")}
        samples.append({name: parts, "latents": {**latents, "label": number}})
    return samples


@pytest.fixture(params=["webdataset", "zarr"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    spec = StoreSpec("loud", "activations", "faithful", True, 2, len(KINDS))
    manifest = make_manifest(spec, request.param, TeacherInfo.model_validate(TEACHER))
    return write_store(str(tmp_path / "store"), manifest, loud_samples(manifest))


AT = np.repeat([0, 1], len(KINDS)), np.tile(np.arange(len(KINDS)), 2)


@pytest.mark.parametrize("verify", [True, False])
def test_stores_hold_samples_of_any_length(
    store: Store, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loud_samples(store.manifest)
    (file, *_) = store.record(0).streams["activations"]
    tars = store.manifest.format == "webdataset"
    if tars:
        assert len(set(file.sizes["tokens"])) > 3
    quick = StreamReader(store, "activations", verify=verify)
    ways = [quick, StreamReader(store, "activations", source=remote(store), verify=verify)]
    if tars:
        assert quick._load_shard(0, 0).layouts[0] is not None
    for reader in ways:
        dirty = {name: np.full_like(array, 7) for name, array in reader.empty(14).items()}
        monkeypatch.setattr(reader, "empty", lambda count, dirty=dirty: dirty)
        for part, array in reader.read(*AT).items():
            for row, number in enumerate(AT[1].tolist()):
                assert np.array_equal(array[row], expected[number]["activations"][part]), part


def remote(store: Store) -> FileSource:
    """A source that reads ranges as from object storage."""
    source = FileSource(store.filesystem, store.root, fetch_whole=lambda *_: True)
    monkey = type("Remote", (FileSource,), {"is_direct": property(lambda self: False)})
    source.__class__ = monkey
    return source


def test_stock_software_opens_it(store: Store) -> None:
    expected = [sample["activations"]["tokens"] for sample in loud_samples(store.manifest)]
    if store.manifest.format == "zarr":
        opened = zarr.open_array(f"{store.root}/activations/tokens", mode="r")
        assert all(np.array_equal(opened[n], array) for n, array in enumerate(expected))
        return
    paths = sorted(str(path) for path in Path(store.root, "activations").glob("*.tar"))
    found = [
        sample["tokens.npy"]
        for sample in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode()
    ]
    for array, stored in zip(expected, found, strict=False):
        assert stored.tobytes() == array.tobytes().rstrip(b"\0")


@pytest.mark.parametrize("damage", ["a bit", "the end", "a shorter header", "a longer header"])
def test_damaged_bytes_are_refused_by_name(store: Store, damage: str) -> None:
    (file,) = [f for f in store.record(1).streams["activations"] if "tokens" in f.offsets]
    path, begin, size = (
        Path(store.root, file.file),
        *(values["tokens"][1] for values in (file.offsets, file.sizes)),
    )
    whole = bytearray(path.read_bytes())
    if damage == "a bit":
        whole[begin + size // 2] ^= 16
    elif damage == "the end":
        whole[begin + size - 1] ^= 255
    else:
        step = -1 if damage == "a shorter header" else 1
        whole[begin : begin + TRIMMED_HEADER] = npy_header((size - TRIMMED_HEADER + step,))
    path.write_bytes(whole)
    with pytest.raises(DamagedShardError, match="column 'tokens'"):
        StreamReader(store, "activations").read(*AT)


def test_a_sample_written_with_impossible_headers_is_refused(tmp_path: Path) -> None:
    spec = StoreSpec("bad", "activations", "faithful", True, 1, 1)
    manifest = make_manifest(spec, "webdataset", TeacherInfo.model_validate(TEACHER))
    sample = loud_samples(manifest)[0]
    sample["activations"]["tokens"][:34] = 255
    store = write_store(str(tmp_path / "store"), manifest, [sample])
    with pytest.raises(DamagedShardError, match="'tokens': its tokens have impossible lengths"):
        StreamReader(store, "activations").read(np.array([0]), np.array([0]))


def test_the_slow_and_the_quick_checksum_of_a_store_agree() -> None:
    data = bytes(range(256)) * 5
    assert extend("crc32c", 0, b"123456789") == 0xE3069283  # RFC 3720's polynomial
    assert extend("crc32", 0, b"123456789") == 0xCBF43926
    for kind in ("crc32", "crc32c"):
        whole = extend(kind, 0, data)
        assert extend(kind, extend(kind, 0, data[:77]), bytearray(data[77:])) == whole
        assert extend(kind, extend(kind, 0, data[:1]), memoryview(data)[1:]) == whole
