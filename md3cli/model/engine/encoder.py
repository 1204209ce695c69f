"""From crops to image embeddings, several pictures at a time, each picture once.

Crops are independent of one another, so a vision micro-batch may be cut from the crops of all pictures in hand,
whatever their tilings; features are then stitched for each run of pictures of one tiling. The only tile of an untiled
picture equals its global crop: it is encoded once and used twice.

A product may round otherwise when it has more rows. On CUDA, micro-batches and projections therefore have a few fixed
sizes, padded with zeros (`micro_batches`), so that a picture's bits do not depend on its company.

Nothing here waits for a CUDA device: pictures go up as uploads.py says, and what a store is to keep comes down to
pinned memory, and is written by a thread when it has arrived (keeper.py). Finished embeddings stay in memory while
there is room (least recently used leave first), and between runs in an `EncodingCache`, from which threads read ahead
(recaller.py).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from md3cli.file_cache import FileCache
from md3cli.images.crops import PREPROCESSING_VERSION, PreparedImage, Tiling
from md3cli.model.engine.generation import AnyImage, EncodedImage
from md3cli.model.engine.keeper import Keeper
from md3cli.model.engine.machine import cpu_threads, milestone, start_download, upload
from md3cli.model.engine.recaller import Recaller
from md3cli.model.engine.uploads import num_distinct_crops, send_crops
from md3cli.model.network.moondream import Moondream3

TENSOR_NAME = "embeddings"
MEMORY_BYTES = 256 * 2**20  # of embeddings kept in memory: 90 pictures of the real model
CROP_FLOP_TARGET = {"cpu": 2e10, "cuda": 4e13, "mps": 4e12}  # of one vision micro-batch
# Crops of a micro-batch that holds one picture alone: untiled, and the tilings of nearly all pictures.
SIZES_OF_ONE = (1, 4, 9, 13)
CROPS_OF_A_PICTURE = 9  # a usual one's; a micro-batch of 36 brings four pictures to their projection


class EncodingCache:
    """Image embeddings that outlive a run, in a folder; one that cannot be written to is only read from then on.

    What is kept are the projected embeddings (2.85 MiB a picture for the real model in bf16), not the keys and values
    made from them (137 MiB): reading those back would take longer than computing them. A key covers everything the
    values depend on: the picture's bytes, how pictures are prepared, the vision weights, the dtype. `model` must
    still hold its plain weights: keys are made of them.
    """

    def __init__(self, files: FileCache, model: Moondream3, *, background: str, quant_vision: str = "none") -> None:
        self.files = files
        self.shape = (model.config.vision.num_patches, model.config.text.dim)
        self.dtype = model.dtype
        self.is_writable = True
        self._context = _context(model, background, quant_vision)

    def load(self, image_key: str) -> Tensor | None:
        """Return the embeddings [P, D] of a picture, on the CPU; None when they are not (rightly) there."""
        payload = self.files.get(self._key(image_key))
        return self._parse(payload) if payload is not None else None

    def save(self, image_key: str, embeddings_PD: Tensor) -> None:
        """Keep a picture's embeddings; a full disk ends keeping, not the run."""
        if not self.is_writable or not embeddings_PD.isfinite().all():  # kept, a passing fault would stay for ever
            return
        try:
            self.files.put(self._key(image_key), save({TENSOR_NAME: embeddings_PD.cpu().contiguous()}))
        except OSError:
            self.is_writable = False

    def _parse(self, payload: bytes) -> Tensor | None:
        try:
            tensor = load(payload).get(TENSOR_NAME)
        except (SafetensorError, ValueError, KeyError):
            return None
        if tensor is None or tensor.shape != self.shape or tensor.dtype != self.dtype:
            return None
        return tensor

    def _key(self, image_key: str) -> str:
        return hashlib.sha256(f"{self._context}:{image_key}".encode()).hexdigest()


def _context(model: Moondream3, background: str, quant_vision: str) -> str:
    """Return everything but the picture that embeddings depend on, as one line."""
    facts = {
        "preprocessing": PREPROCESSING_VERSION,
        "crops": asdict(model.config.vision.crop_config),
        "background": background,
        "weights": vision_digest(model),
        "dtype": str(model.dtype),
        "quant_vision": quant_vision,
    }
    return json.dumps(facts, sort_keys=True)


def vision_digest(model: Moondream3) -> str:
    """Return a digest of the vision weights' bytes (0.9 GB of the real model: about a second)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.vision.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class MicroBatch(NamedTuple):
    """`num_crops` crops from `first` on, of those in hand, with zeros behind them up to `size`."""

    first: int
    num_crops: int
    size: int


def micro_batches(counts: Sequence[int], most: int, sizes: Sequence[int] | None) -> Iterator[MicroBatch]:
    """Cut the crops of pictures, `counts` of each, into micro-batches of at most `most` crops, in order.

    `sizes` None cuts them as they come, without padding; one size cuts them as they come, all of that size. Of several
    (ascending) each picture gets its own: the smallest that holds what is left of it, and before that the largest.
    Sizes above `most` are left out; where none is left, `most` is the only one.
    """
    allowed = None if sizes is None else [size for size in sizes if size <= most] or [most]
    if allowed is None or len(allowed) == 1:
        counts = (sum(counts),)
    first = 0
    for count in counts:
        end = first + count
        while first < end:
            left = end - first
            size = min(left, most) if allowed is None else next((s for s in allowed if s >= left), allowed[-1])
            yield MicroBatch(first, min(left, size), size)
            first += min(left, size)


def crop_sizes(max_crops: int | None, device: torch.device) -> tuple[int, ...] | None:
    """Return the fixed sizes of micro-batches of up to `max_crops`: one for many pictures, some for one at a time.

    Elsewhere than on CUDA there are none: padding would take time. (On a CPU, too, one crop of a small model in bf16
    may round otherwise alone than beside others.)
    """
    if device.type != "cuda" or max_crops is None:
        return None
    if max_crops > SIZES_OF_ONE[-1]:
        return (max_crops,)
    return (*(size for size in SIZES_OF_ONE if size < max_crops), max_crops)


class ImageEncoder:
    """Turns prepared pictures into embeddings [P, D] on the model's device."""

    def __init__(
        self,
        model: Moondream3,
        *,
        store: EncodingCache | None = None,
        memory_bytes: int = MEMORY_BYTES,
        max_crops: int | None = None,
        sizes: Sequence[int] | None = None,
        threads: int | None = None,
    ) -> None:
        """Cut micro-batches of up to `max_crops`, of fixed `sizes` where they are given (`micro_batches`).

        Use `threads` for this stage alone: a micro-batch of a small model feeds more of them than a decode step.
        """
        self.model = model
        self.store = store
        self.max_crops = max_crops or crops_per_batch(model)
        self.sizes = sizes
        # Pictures of one projection: a fixed number where sizes are, and the host can hand over many at once.
        self.projected = 1 if sizes is None else max(1, self.max_crops // CROPS_OF_A_PICTURE)
        self.encode_rows: Callable[[Tensor], Tensor] = model.vision.encode_rows
        self._threads = threads
        self._ready: dict[str, Tensor] = {}  # of pictures that are about to be asked something
        self._memory: OrderedDict[str, Tensor] = OrderedDict()  # of pictures that may come again
        self._memory_bytes, self._used_bytes = memory_bytes, 0
        self._keeper = Keeper()
        # Elsewhere than beside a GPU, reading takes no time worth a thread.
        self._recaller = Recaller(store.load) if store is not None and model.device.type == "cuda" else None
        self.num_images = 0  # pictures that went through the encoder
        self.num_crops = 0
        self.num_reused = 0  # pictures found in memory or on disk
        self.seconds = 0.0  # of the host: on CUDA it launches encoding in that time and does not wait for it

    def forgetful(self) -> ImageEncoder:
        """Return an encoder that does the same and has seen no picture, neither in memory nor on disk."""
        return ImageEncoder(self.model, max_crops=self.max_crops, sizes=self.sizes, threads=self._threads)

    def expect(self, images: Iterable[AnyImage]) -> None:
        """Begin to read, on a GPU's host, what a store has of the pictures that are asked next; waits for nothing."""
        if self._recaller is not None:
            keys = (image.sha256 for image in images if not isinstance(image, EncodedImage))
            self._recaller.expect(key for key in keys if key not in self._ready and key not in self._memory)

    def find(self, image: AnyImage) -> Tensor | None:
        """Return embeddings that are at hand already: given, in memory, or on disk."""
        if isinstance(image, EncodedImage):
            embeddings: Tensor = image.embeddings
            return upload(embeddings.to(self.model.dtype), self.model.device)
        found = self._memory.get(image.sha256)
        if found is not None:
            self._memory.move_to_end(image.sha256)
        elif self.store is not None:
            found = self._recaller.take(image.sha256) if self._recaller is not None else self.store.load(image.sha256)
            if found is not None:
                found = upload(found.to(self.model.dtype), self.model.device)
                self._remember(image.sha256, found)
        self.num_reused += found is not None
        return found

    def prepare(self, needed: Iterable[AnyImage], ahead: Iterable[AnyImage], *, most_ready: int = 0) -> None:
        """Make the embeddings of `needed` ready to `take`, and of pictures `ahead` while the micro-batch has room.

        Looking ahead fills a micro-batch; it starts one only while fewer than `most_ready` pictures are ready.
        """
        missing: dict[str, PreparedImage] = {}
        num_crops = 0
        for image, is_needed in itertools.chain(((i, True) for i in needed), ((i, False) for i in ahead)):
            if image.sha256 in self._ready or image.sha256 in missing:
                continue
            if not is_needed and not missing and len(self._ready) >= most_ready:
                break
            count = 0 if isinstance(image, EncodedImage) else num_distinct_crops(image.tiling)
            if not is_needed and missing and count > self._room_behind(num_crops):
                break
            found = self.find(image)
            if found is not None:
                self._ready[image.sha256] = found
            elif not isinstance(image, EncodedImage):
                missing[image.sha256] = image
                num_crops += count
        if missing:
            self._ready.update(zip(missing, self.encode(list(missing.values())), strict=True))

    def _room_behind(self, num_crops: int) -> int:
        """Return the crops for which there is room in the last micro-batch behind so many; where it would be padded."""
        if self.sizes is not None and len(self.sizes) == 1:
            return -num_crops % self.max_crops
        return max(0, self.max_crops - num_crops)

    def take(self, image_key: str) -> Tensor:
        """Return the embeddings [P, D] that `prepare` made ready."""
        return self._ready[image_key]

    def keep_ready(self, image_keys: Container[str | None]) -> None:
        """Drop what was made ready for other pictures than these."""
        self._ready = {key: embeddings for key, embeddings in self._ready.items() if key in image_keys}

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """Encode pictures that are not at hand, in order, and remember their embeddings.

        Of patch features no more are kept than those of a micro-batch and a picture: 128 pictures of 9 crops would
        hold 3.9 GB. On CUDA the embeddings are still being computed when this returns, and a store has them after
        `save_encoded`.
        """
        started = time.perf_counter()
        counts = [num_distinct_crops(image.tiling) for image in images]
        with cpu_threads(self._threads):
            crops_NSSC = send_crops(images, self.model.device)
            embeddings = list(self._embeddings(crops_NSSC, counts, [image.tiling for image in images]))
        for image, embedding in zip(images, embeddings, strict=True):
            self._remember(image.sha256, embedding)
        if self.store is not None:
            self._start_keeping(self.store, images, embeddings)
        self.num_images += len(images)
        self.num_crops += sum(counts)
        self.seconds += time.perf_counter() - started
        return embeddings

    def _embeddings(self, crops_NSSC: Tensor, counts: Sequence[int], tilings: Sequence[Tiling]) -> Iterator[Tensor]:
        """Yield each picture's embeddings [P, D]; `crops_NSSC` are those of all pictures, `counts` of each."""
        coming = deque(zip(counts, tilings, strict=True))
        rest_NPE = None  # features of crops whose pictures lack some
        gathered: list[Tensor] = []  # of pictures that wait for their projection
        for batch in micro_batches(counts, self.max_crops, self.sizes):
            found_NPE = self._features(crops_NSSC[batch.first : batch.first + batch.num_crops], batch.size)
            rest_NPE = found_NPE if rest_NPE is None else torch.cat([rest_NPE, found_NPE])
            complete = []
            num_crops = 0
            while coming and num_crops + coming[0][0] <= len(rest_NPE):
                complete.append(coming.popleft())
                num_crops += complete[-1][0]
            for (count, tiling), pictures in itertools.groupby(complete):
                taken = count * len(list(pictures))
                features_BNPE = rest_NPE[:taken].unflatten(0, (-1, count))
                if count == 1:  # the only tile of an untiled picture is its global crop
                    features_BNPE = features_BNPE.expand(-1, 2, -1, -1)
                gathered += self.model.vision.gather(features_BNPE, tiling)
                rest_NPE = rest_NPE[taken:]
            while len(gathered) >= self.projected or (gathered and not coming):
                yield from self._project(gathered[: self.projected])
                del gathered[: self.projected]

    def _features(self, crops_NSSC: Tensor, size: int) -> Tensor:
        """Return the features [N, P, E] of crops, encoded as a micro-batch of `size`."""
        count = len(crops_NSSC)
        if count < size:
            crops_NSSC = F.pad(crops_NSSC, (0, 0, 0, 0, 0, 0, 0, size - count))
        return self.encode_rows(self.model.vision.patch_rows(crops_NSSC))[:count]

    def _project(self, gathered: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the embeddings of pictures, projected in one product of `projected` pictures."""
        if self.projected == 1:
            (features,) = gathered
            yield self.model.vision.proj_mlp(features)
            return
        missing = [torch.zeros_like(gathered[0])] * (self.projected - len(gathered))
        embeddings_BPD = self.model.vision.proj_mlp(torch.stack([*gathered, *missing]))
        for embeddings_PD in embeddings_BPD[: len(gathered)]:
            yield embeddings_PD.clone()  # memory of its own, which goes when the picture goes

    def _start_keeping(
        self, store: EncodingCache, images: Sequence[PreparedImage], embeddings: Sequence[Tensor]
    ) -> None:
        """Begin to bring embeddings to the host, where `store` keeps them."""
        coming = {image.sha256: start_download(found) for image, found in zip(images, embeddings, strict=True)}
        wait = milestone(self.model.device)
        save = partial(_save, store, coming, wait)
        if wait is None:
            save()  # there is nothing to wait for, and a thread that writes would take a core from those that compute
        else:
            self._keeper.add(save, sum(tensor.nbytes for tensor in coming.values()))

    def save_encoded(self) -> None:
        """Wait until the store has what was encoded so far: before an engine is dropped, and when it has no work."""
        self._keeper.flush()

    def _remember(self, key: str, embeddings_PD: Tensor) -> None:
        if key in self._memory:
            return
        self._memory[key] = embeddings_PD
        self._used_bytes += embeddings_PD.nbytes
        while self._used_bytes > self._memory_bytes and len(self._memory) > 1:
            _, dropped = self._memory.popitem(last=False)
            self._used_bytes -= dropped.nbytes


def _save(store: EncodingCache, coming: Mapping[str, Tensor], wait: Callable[[], None] | None) -> None:
    """Save embeddings that are on their way to the host, once `wait` has seen them arrive."""
    if wait is not None:
        wait()
    for image_key, embeddings in coming.items():
        store.save(image_key, embeddings)


def crop_flops(model: Moondream3) -> float:
    """Return the floating-point operations of one crop through the encoder (a multiply-add counts two)."""
    v = model.config.vision
    linear = v.enc_dim * v.patch_dim + v.enc_n_layers * (4 * v.enc_dim**2 + 2 * v.enc_dim * v.enc_ff_dim)
    attention = v.enc_n_layers * 2 * v.num_patches * v.enc_dim
    return 2.0 * v.num_patches * (linear + attention)


def crops_per_batch(model: Moondream3) -> int:
    """Return the crops of a micro-batch: enough work to hide launching it, no more.

    On CPU one crop of the real model is already compute-bound and batching gains nothing (measured:
    4.18 s a crop at 1, 4.23 at 8); small models need dozens.
    """
    target = CROP_FLOP_TARGET.get(model.device.type, CROP_FLOP_TARGET["cpu"])
    return int(min(128, max(1, target // crop_flops(model))))
