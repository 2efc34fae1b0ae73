"""Pictures that viewers upload: decoded with suspicion, kept for a while, in memory and at the models' size only."""

import io
import secrets
import time
import warnings
from collections import OrderedDict

from PIL import Image, ImageOps

from longlive.web.messages import Picture
from longlive.web.protocol import ProtocolError

_FORMATS = ("PNG", "JPEG", "WEBP")


def decode(data: bytes, height: int, width: int, max_px: int) -> tuple[Picture, tuple[int, int]]:
    """The picture scaled to cover height x width and cropped around its centre, and its own (width, height).

    Raises ProtocolError for what is no PNG, JPEG or WebP, for damage, and, before it is decoded, for size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is ours
            with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
                size = opened.size
                if size[0] * size[1] > max_px:
                    raise Image.DecompressionBombError(f"{size[0]}x{size[1]}")
                picture = _upright_rgb(opened)
    except Image.DecompressionBombError:
        raise ProtocolError("too_large", f"a picture may have {max_px} pixels") from None
    except Exception as error:  # damaged files make Pillow's decoders raise whatever comes up
        raise ProtocolError("bad_picture", "this is no PNG, JPEG or WebP that can be read") from error
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return Picture(fitted.tobytes(), height, width), size


def _upright_rgb(opened: Image.Image) -> Image.Image:
    """Turned as its metadata says; on white where it is transparent."""
    picture: Image.Image = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I;16"):
        picture = picture.point(lambda value: value / 256).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


class Uploads:
    """The newest pictures by key. A picture may be used several times until it goes."""

    def __init__(self, max_kept: int, keep_s: float) -> None:
        self._max_kept, self._keep_s = max_kept, keep_s
        self._pictures: OrderedDict[str, tuple[float, Picture]] = OrderedDict()

    def add(self, picture: Picture) -> str:
        key = secrets.token_urlsafe(18)
        self._pictures[key] = time.monotonic(), picture
        self.forget_old()
        return key

    def get(self, key: str) -> Picture:
        """Raises ProtocolError."""
        self.forget_old()
        if key not in self._pictures:
            raise ProtocolError("no_upload", "this upload is not there, or not any more: send it again")
        return self._pictures[key][1]

    def forget_old(self) -> None:
        """Free what is older than `keep_s`, or more than is kept."""
        oldest_time = time.monotonic() - self._keep_s
        while self._pictures:
            added, _ = next(iter(self._pictures.values()))
            if len(self._pictures) <= self._max_kept and added >= oldest_time:
                return
            self._pictures.popitem(last=False)
