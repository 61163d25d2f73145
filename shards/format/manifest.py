"""The records of a finished dataset: its manifest, the shard table that it names, and what stands in them.

A folder without `manifest.json` is unfinished, whatever else it holds. `shards.dataset.dataset` opens one.
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.artifacts import fingerprint
from pipeline.errors import InputError
from shards.format.index import FORMAT_VERSION

Kind = Literal["images", "tokens", "codes"]
"""What a manifest names: source images, crops with codes, or codes alone (a code layer)."""
EncoderPrecision = Literal["fp32", "bf16", "fp16"]

MANIFEST = "manifest.json"
FINGERPRINT = "fingerprint"
ROW_GROUP = 8192
"""Rows of the shard table that are read together; 500,000 shards have 62 such groups."""


class DamageError(InputError):
    """An object of a dataset is missing, or its bytes are not those that were written; it is named."""


# ------------------------------------------------------------------------------------------------ one shard


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One shard of one view: its ids [first_id, end_id), and its objects by place, size and hash.

    Places are relative to the manifest's folder in everything that is stored, and complete URLs in what
    `Dataset.shard` returns. A foreign tar (indexed in place) always has its absolute URL and, instead of a
    hash, the version it had: ETag or modification time. A code layer's shard has no tar of its own and names
    the one of its pixels, by a place that begins with `../`. `samples` are stored, `rejected` are not.
    """

    view: int
    number: int
    first_id: int
    end_id: int
    samples: int
    rejected: int
    tar: str
    tar_bytes: int
    tar_sha256: str | None
    tar_version: str | None
    index: str
    index_bytes: int
    index_sha256: str
    rejects: str | None = None
    rejects_bytes: int | None = None
    rejects_sha256: str | None = None

    @property
    def name(self) -> str:
        return shard_name(self.view, self.number)

    @property
    def in_place(self) -> bool:
        """True where the tar is somebody else's: check version and per-image hashes, not one hash."""
        return self.tar_sha256 is None

    def resolved(self, root: str) -> ShardInfo:
        """The same with complete URLs."""
        return dataclasses.replace(
            self,
            tar=self.tar if self.in_place else _resolved(root, self.tar),
            index=storage.join(root, self.index),
            rejects=None if self.rejects is None else storage.join(root, self.rejects),
        )


def _resolved(root: str, path: str) -> str:
    """A relative place below `root`, or beside it: object stores do not know `..`."""
    while path.startswith("../"):
        root, path = root.rstrip("/").rpartition("/")[0], path[3:]
    return storage.join(root, path)


def shard_name(view: int, number: int) -> str:
    """`v00-00000`."""
    return f"v{view:02d}-{number:05d}"


# ------------------------------------------------------------------------------------------------ shard table

TABLE_SCHEMA = pa.schema(
    [
        pa.field("view", pa.int8(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),
        pa.field("first_id", pa.int64(), nullable=False),
        pa.field("end_id", pa.int64(), nullable=False),
        pa.field("samples", pa.int32(), nullable=False),
        pa.field("rejected", pa.int32(), nullable=False),
        pa.field("tar", pa.string(), nullable=False),
        pa.field("tar_bytes", pa.int64(), nullable=False),
        pa.field("tar_sha256", pa.binary(32)),
        pa.field("tar_version", pa.string()),
        pa.field("index", pa.string(), nullable=False),
        pa.field("index_bytes", pa.int64(), nullable=False),
        pa.field("index_sha256", pa.binary(32), nullable=False),
        pa.field("rejects", pa.string()),
        pa.field("rejects_bytes", pa.int64()),
        pa.field("rejects_sha256", pa.binary(32)),
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)
HASH_COLUMNS = ("tar_sha256", "index_sha256", "rejects_sha256")


class TableWriter:
    """Builds the shard table row by row, holding only the last few thousand rows as Python objects."""

    def __init__(self) -> None:
        self._sink = io.BytesIO()  # gives its bytes without a copy: 45 MB for 500,000 shards
        # no dictionaries: they would only repeat paths and hashes, which are all different
        self._writer = pq.ParquetWriter(self._sink, TABLE_SCHEMA, compression="zstd", use_dictionary=False)
        self._rows: list[dict[str, Any]] = []

    def append(self, shard: ShardInfo) -> None:
        row = dataclasses.asdict(shard)
        for column in HASH_COLUMNS:
            row[column] = None if row[column] is None else bytes.fromhex(row[column])
        self._rows.append(row)
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def finish(self) -> bytes:
        """The Parquet bytes; the writer is used up."""
        self._flush()
        self._writer.close()
        return self._sink.getvalue()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(
                pa.Table.from_pylist(self._rows, schema=TABLE_SCHEMA), row_group_size=ROW_GROUP
            )
            self._rows = []


# ------------------------------------------------------------------------------------------------ manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeEntry:
    """One stored image and the sha256 of its decoded pixels: unmasks a decoder that is not the writer's."""

    view: int
    number: int
    row: int
    key: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TableName:
    """Name, size and hash of the shard table, which lies beside the manifest."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonBlock:
    """A JSON object with known settings as fields; `other` holds what else was written, and nulls.

    So `to_json` gives the same bytes again, whatever version wrote them.
    """

    other: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        names = [entry.name for entry in dataclasses.fields(self) if entry.name != "other"]
        value = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        blocks = {name: block.to_json() for name, block in value.items() if isinstance(block, JsonBlock)}
        return json.loads(json.dumps({**self.other, **value, **blocks}))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """TypeError or ValueError where a field without a default is missing, or is none."""
        names = {entry.name for entry in dataclasses.fields(cls)} - {"other"}
        known = {key: entry for key, entry in value.items() if key in names and entry is not None}
        return cls(**known, other={key: entry for key, entry in value.items() if key not in known})


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSpec(JsonBlock):
    """What a dataset records of the tokenizer that made its codes.

    `fingerprint` is that of the codes: the artifact's, `artifact_fingerprint`, and the encoder's precision.
    `grid` are rows and columns of codes, `image_size` is the side of a crop in pixels.
    """

    fingerprint: str
    codebook_size: int
    image_size: int
    grid: tuple[int, int]
    artifact_fingerprint: str | None = None
    precision: EncoderPrecision | None = None

    def __post_init__(self) -> None:
        rows, columns = self.grid
        object.__setattr__(self, "grid", (rows, columns))

    @property
    def patch_size(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return self.image_size // self.grid[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeRecipe(JsonBlock):
    """How a tokenizer ran: type of device, precision of the encoder, images at once, CPU threads."""

    device: str
    precision: EncoderPrecision
    batch_size: int
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(JsonBlock):
    """Settings that decide the bytes of a dataset; those that its kind does not have are None.

    Image datasets have `decode` (see `decode.decode_config_of`) and the Parquet column they were read from;
    token datasets `views` (a `ViewPolicy`), `decode`, `encode` and the versions of the libraries that touch
    pixels; code layers `encode` and `libraries`.
    """

    decode: dict[str, Any] | None = None
    image_column: str | None = None
    views: dict[str, Any] | None = None
    encode: EncodeRecipe | None = None
    libraries: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.encode, dict):
            object.__setattr__(self, "encode", EncodeRecipe.from_json(self.encode))

    def require_decode(self) -> dict[str, Any]:
        """`decode` of images, or of the images that crops were made from."""
        if self.decode is None:
            raise InputError("the recipe does not say how images were decoded; prepare them again")
        return self.decode

    def require_views(self) -> dict[str, Any]:
        """`views` of crops."""
        if self.views is None:
            raise InputError("the recipe does not say how views were drawn; precompute tokens again")
        return self.views

    def require_encode(self) -> EncodeRecipe:
        """`encode` of codes."""
        if self.encode is None:
            raise InputError("the recipe does not say how the tokenizer was run; precompute tokens again")
        return self.encode


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a finished set of shards contains, and what produced it.

    Written last: a directory without `manifest.json` is unfinished, whatever else it holds. No time, host or
    credentials are in it, so that two honest writers make the same bytes. `inputs` are fingerprints by name,
    `recipe` is whatever decided the bytes. Counts are sums over views; `written_per_view` has one entry for
    each of the views first_view, first_view + 1, …
    """

    kind: Kind
    plan: str
    inputs: dict[str, str]
    recipe: Recipe
    first_view: int
    shards_per_view: int
    written_per_view: tuple[int, ...]
    samples_in: int
    samples_written: int
    samples_rejected: dict[str, int]
    class_names: tuple[str, ...] | None
    tokenizer: TokenizerSpec | None
    details: dict[str, Any]
    probe: tuple[ProbeEntry, ...]
    table: TableName
    format_version: int = FORMAT_VERSION

    @property
    def num_views(self) -> int:
        return len(self.written_per_view)

    @property
    def fingerprint(self) -> str:
        """Of the whole dataset: the header names the table by hash, and the table every object."""
        return fingerprint(self.to_json())

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Of the codes; None for images."""
        return None if self.tokenizer is None else self.tokenizer.fingerprint

    def require_tokenizer(self) -> TokenizerSpec:
        """The tokenizer that made the codes; InputError for images, which have none."""
        if self.tokenizer is None:
            raise InputError("an image dataset has no codes; precompute tokens from it first")
        return self.tokenizer

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the code grid."""
        return self.require_tokenizer().grid

    def to_json(self) -> dict[str, Any]:
        tokenizer = None if self.tokenizer is None else self.tokenizer.to_json()
        value = {**dataclasses.asdict(self), "recipe": self.recipe.to_json(), "tokenizer": tokenizer}
        return json.loads(json.dumps(value, allow_nan=False))

    def to_bytes(self) -> bytes:
        """The file: the header and, since nothing else vouches for it, its fingerprint."""
        value = {**self.to_json(), FINGERPRINT: self.fingerprint}
        return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Manifest:
        names, tokenizer = value["class_names"], value["tokenizer"]
        changed = {
            "written_per_view": tuple(value["written_per_view"]),
            "class_names": None if names is None else tuple(names),
            "recipe": Recipe.from_json(value["recipe"]),
            "tokenizer": None if tokenizer is None else TokenizerSpec.from_json(tokenizer),
            "probe": tuple(ProbeEntry(**entry) for entry in value["probe"]),
            "table": TableName(**value["table"]),
        }
        return cls(**{key: entry for key, entry in value.items() if key != FINGERPRINT} | changed)


def read_manifest(url: str) -> Manifest:
    """The manifest of a finished dataset; InputError where there is none, or one that cannot be read.

    DamageError where its bytes are not those that its own fingerprint vouches for.
    """
    location = storage.join(url, MANIFEST)
    try:
        data = storage.read(location)
        value = json.loads(data)
        version = value["format_version"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(_why_absent(url)) from None
    except (ValueError, KeyError, TypeError):
        raise DamageError(
            f"{location} is not the manifest of a dataset; check the URL, or repair the dataset"
        ) from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{url} has format version {version}, this program reads {FORMAT_VERSION}; use a newer program"
        )
    try:
        manifest = Manifest.from_json(value)
        # Manifests made before they held a fingerprint are taken at their word.
        sound = FINGERPRINT not in value or manifest.to_bytes() == data
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DamageError(f"{location} is damaged ({error}); copy the dataset again or repair it") from None
    if not sound:
        raise DamageError(
            f"{location} is damaged: its own fingerprint is not that of what it says; copy the dataset again "
            "or repair it"
        )
    return manifest


def _why_absent(url: str) -> str:
    if storage.exists(storage.join(url, "plan.json")):
        return f"{url} is unfinished: a plan but no manifest; run the job that writes it again, it will go on"
    parts = [part for part in ("train", "val") if storage.exists(storage.join(url, part, MANIFEST))]
    if parts:
        first = storage.join(url, parts[0])
        return f"{url} is not one dataset but holds {' and '.join(parts)}; name one of them, such as {first}"
    return f"there is no dataset at {url}: no {MANIFEST}; check the URL, or prepare one there"
