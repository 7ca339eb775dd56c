"""A checkpoint that answers questions about an image, asked as it was asked in training."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from matvlm.data.encoding import Encoder, Turn
from matvlm.data.images import decode
from matvlm.data.rows import BadSample
from matvlm.evaluate.checkpoint import open_checkpoint
from matvlm.generation import Engine, Sampling, Stream
from matvlm.inspection.model import count
from matvlm.models import hybrid
from matvlm.models.auto import SECTION
from matvlm.models.folder import CONFIG, read_object
from matvlm.models.locate import locate
from matvlm.storage import read_bytes

BLANK = (224, 224)


class Speaker:
    """The model at ``uri``, in the dtype of its files (float32 on a CPU).

    Raises:
        EvaluationError: it cannot be opened, or has no image processor or chat template.
        StorageError: nothing is there, or it cannot be fetched.
    """

    def __init__(self, uri: str, device: str):
        self.uri = uri
        self.model, processor = open_checkpoint(uri, device)
        self.engine, self.encoder = Engine(self.model, processor), Encoder(processor)

    def ask(self, image: Image.Image, question: str, sampling: Sampling, turns: Sequence[Turn] = ()) -> Stream:
        """The answer to ``question`` after ``turns`` about ``image``, piece by piece.

        Raises:
            ValueError: the question cannot be asked; see ``Encoder.ask``.
        """
        inputs = self.encoder.ask(image, question, turns)
        return self.engine.stream({name: self._placed(value) for name, value in inputs.items()}, sampling)

    def warm_up(self, sampling: Sampling) -> None:
        """Answer as far as the second token, so that no figure holds what happens only once."""
        stream = self.ask(Image.new("RGB", BLANK), "?", sampling)
        for _ in stream:
            if len(stream.tokens) > 1:
                break

    @property
    def facts(self) -> str:
        """What it is, in a line."""
        layers, mixers = len(hybrid.decoder_layers(self.model)), len(hybrid.mixers(self.model))
        kind = f"Mamba-2 in {mixers} of {layers} layers" if mixers else f"{layers} layers, all attention"
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{kind}; {count(self.model.parameters()):,} parameters; {dtype} on {self.model.device.type}"

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)


def figures(stream: Stream) -> str:
    """How long an answer is and what it took; the image's decoding is not in it, the vision tower is."""
    tokens = len(stream.tokens)
    parts = [f"{tokens:,} token{'s' * (tokens != 1)}", f"first after {stream.first_token_seconds * 1000:,.0f} ms"]
    if stream.decode_tokens_per_second:
        parts.append(f"then {stream.decode_tokens_per_second:,.1f} tokens/s")
    return ", ".join(parts)


def open_image(path: str) -> Image.Image:
    """The image in the file ``path``, local or on S3, as RGB pixels.

    Raises:
        StorageError: it cannot be read.
        ValueError: it is no image, or a damaged one.
    """
    return as_image(read_bytes(path), path)


def as_image(content: bytes, name: str) -> Image.Image:
    """``content`` of the file ``name`` as the RGB pixels that training has of such a file.

    Raises:
        ValueError: it is no image, or a damaged one.
    """
    try:
        return decode(content, {"bytes": None, "path": name}, name)
    except BadSample:
        raise ValueError(f"{name}: no image, or a damaged one: give a PNG, a JPEG or the like") from None


def teacher_of(uri: str) -> str | None:
    """The teacher that the student at ``uri`` says it comes from, or None.

    Raises:
        ModelFolderError, StorageError: as ``locate`` does, or its config.json is missing or is not JSON.
    """
    section = read_object(locate(uri) / CONFIG).get(SECTION) or {}
    teacher: str | None = section.get("provenance", {}).get("teacher")
    return teacher
