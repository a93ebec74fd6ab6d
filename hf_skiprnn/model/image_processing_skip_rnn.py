"""The image processor: it only scales pixels to [0, 1], as pixels / 255 does.

This file is saved with a checkpoint, so it imports nothing from this package. It does not need torchvision.
"""

from typing import Any, TypedDict

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, to_numpy_array
from transformers.utils.import_utils import is_vision_available

if is_vision_available():  # that is, Pillow is installed; AutoImageProcessor asks for it
    from PIL import Image

PIL_MODES = {1: "L", 3: "RGB"}
# Modes with more than 8 bits per channel: PIL converts them by clipping, not scaling.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class SkipRNNImageProcessorKwargs(TypedDict, total=False):
    """Options of the processor that can be passed to `from_pretrained` to replace saved values."""

    num_channels: int
    size: dict[str, int] | None


class SkipRNNImageProcessor(BaseImageProcessor):
    """Turns images into `pixel_values` [B, C, H, W], float32 in [0, 1]; the model reads the pixels row by row.

    8-bit pixels are divided by 255. Floating-point pixels must be in [0, 1]. Nothing is resized, because that would
    change the sequence of pixels.

    Args:
        num_channels: 1 (grayscale) or 3 (RGB). PIL images and uint8 arrays of the other kind are converted as PIL does.
        size: {"height": H, "width": W} that every image must have, or None for any size.

    Raises:
        ValueError: num_channels is not 1 or 3, or size has another form.
    """

    valid_kwargs = SkipRNNImageProcessorKwargs  # type: ignore[assignment]  # has none of transformers' options (resize)

    def __init__(self, num_channels: int = 1, size: dict[str, int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_channels not in PIL_MODES:
            raise ValueError(f"num_channels must be 1 (grayscale) or 3 (RGB); got {num_channels!r}.")
        if size is not None and set(size) != {"height", "width"}:
            raise ValueError(f'size must be {{"height": H, "width": W}} or None; got {size!r}.')
        self.num_channels = num_channels
        self.size = None if size is None else dict(size)

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        num_channels: int | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return the pixel_values of one image or several.

        Args:
            images: one image, a list, or a batch with four axes. An image is a PIL image, or an array or tensor [H, W],
                [H, W, C] or [C, H, W].
            return_tensors: "pt", "np", or None for a list of arrays.
            num_channels: used instead of the processor's.
            input_data_format: "channels_first" or "channels_last", for arrays whose shape is ambiguous.
            kwargs: other options are refused.

        Raises:
            ValueError: an image has another size, kind or range of values; or an option is unknown.
        """
        if kwargs:
            raise ValueError(f"SkipRNNImageProcessor only rescales; it takes no {', '.join(sorted(kwargs))}.")
        channels = self.num_channels if num_channels is None else num_channels
        arrays = [self.pixels(image, channels, input_data_format) for image in _as_list(images)]
        shapes = {array.shape for array in arrays}
        if return_tensors is not None and len(shapes) > 1:
            raise ValueError(f"Images of one batch must have one size; got {sorted(shapes)} (channels, height, width).")
        if return_tensors is not None and len({array.dtype for array in arrays}) == 1:
            data = unit_range(np.stack(arrays))  # all at once, which takes a fraction of the time
        else:
            data = [unit_range(array) for array in arrays]
            data = np.stack(data) if return_tensors is not None and data else data
        return BatchFeature(data={"pixel_values": data}, tensor_type=return_tensors)

    def pixels(
        self, image: Any, channels: int | None = None, data_format: str | ChannelDimension | None = None
    ) -> np.ndarray:
        """Return the pixels [C, H, W] of one image in its own range; `preprocess` scales them and tells the errors."""
        channels = channels or self.num_channels
        pixels = (
            _from_pil(image, channels) if isinstance(image, Image.Image) else _from_array(image, channels, data_format)
        )
        height, width = pixels.shape[1:]
        if self.size is not None and (height, width) != (self.size["height"], self.size["width"]):
            raise ValueError(
                f"This processor takes images of {self.size['height']} x {self.size['width']} pixels; got "
                f"{height} x {width}. Resize or crop the image first: it is not done here."
            )
        return pixels


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def _from_pil(image: "Image.Image", channels: int) -> np.ndarray:
    """Return a PIL image as uint8 [C, H, W]."""
    if image.mode in DEEP_MODES:
        raise ValueError(f"Images must have 8 bits per channel; got PIL mode {image.mode!r}. Scale it to 0..255 first.")
    wanted = PIL_MODES[channels]
    pixels = np.asarray(image if image.mode == wanted else image.convert(wanted))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _from_array(image: Any, channels: int, data_format: str | ChannelDimension | None) -> np.ndarray:
    """Return an array as [C, H, W] in its dtype; uint8 arrays with another number of channels are converted by PIL."""
    array = to_numpy_array(image)
    if array.ndim == 2:
        array, data_format = array[None], ChannelDimension.FIRST
    if array.ndim != 3:
        raise ValueError(f"An image is [H, W], [H, W, C] or [C, H, W]; got {array.shape}.")
    if data_format is None:
        data_format = infer_channel_dimension_format(array, num_channels=(1, 3))
    if ChannelDimension(data_format) is ChannelDimension.LAST:
        array = array.transpose(2, 0, 1)
    if array.shape[0] == channels:
        return array
    if array.dtype != np.uint8 or array.shape[0] not in PIL_MODES:
        raise ValueError(
            f"Expected {channels} channel(s); got an array {array.shape} of {array.dtype}. Only uint8 images of 1 or 3 "
            "channels are converted."
        )
    return _from_pil(Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)), channels)


def unit_range(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as float32 in [0, 1]: divide 8-bit pixels by 255; floats stay as they are."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"Pixels must be uint8 in 0..255 or floats in [0, 1]; got {pixels.dtype}.")
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"Floating-point pixels must lie in [0, 1]; got {pixels.min()} to {pixels.max()}. Divide by 255 first."
        )
    return np.ascontiguousarray(pixels, np.float32)
