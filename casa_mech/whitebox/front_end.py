"""The processor's front ends once more, in differentiable torch: pixels to patches, samples to log-mel features.

Both mirror transformers (`Qwen2VLImageProcessorPil`, `WhisperFeatureExtractor`) and are tested against it. Resizing is
left out: an attacked picture has the size that the processor would give it, so that resizing it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize


def processed_picture(processor: Qwen2VLImageProcessorPil, picture: Image.Image) -> np.ndarray:
    """`picture` at the size at which the model sees it: uint8 [height, width, 3]."""
    height, width = smart_resize(
        picture.height,
        picture.width,
        factor=processor.patch_size * processor.merge_size,
        min_pixels=processor.size["shortest_edge"],
        max_pixels=processor.size["longest_edge"],
    )
    if (height, width) != (picture.height, picture.width):
        picture = picture.resize((width, height), Image.Resampling(processor.resample))
    return np.asarray(picture.convert("RGB"))


def patches(processor: Qwen2VLImageProcessorPil, pictures: Sequence[Tensor]) -> Tensor:
    """`pixel_values` [patch, 3 · 2 · 14 · 14] of `pictures` [height, width, 3], values 0..255; with their gradient.

    Normalises and cuts as the library's processor does: patches in the order of the 2 x 2 groups that become a token,
    each repeated for the two frames of a still picture.
    """
    size, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    rows = []
    for picture in pictures:
        mean, deviation = (picture.new_tensor(value) for value in (processor.image_mean, processor.image_std))
        normal = ((picture * processor.rescale_factor - mean) / deviation).permute(2, 0, 1)
        height, width = normal.shape[1] // size, normal.shape[2] // size
        cut = normal.reshape(3, height // merge, merge, size, width // merge, merge, size)
        cut = cut.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
        rows.append(cut.expand(*cut.shape[:5], frames, *cut.shape[6:]).reshape(height * width, -1))
    return torch.cat(rows)


def log_mel(extractor: WhisperFeatureExtractor, clips: Sequence[Tensor]) -> Tensor:
    """`input_features` [clip, mel, frame] of `clips` [samples], values -1..1 at 16 kHz; with their gradient.

    Clips are padded to the longest and one second more, as `OmniProcessor.audio` does, and frames beyond the longest
    clip are cut off.
    """
    longest = max(len(clip) for clip in clips)
    full = longest + extractor.sampling_rate
    waves = torch.stack([functional.pad(clip, (0, full - len(clip))) for clip in clips])
    window = torch.hann_window(extractor.n_fft, device=waves.device)
    spectrum = torch.stft(waves, extractor.n_fft, extractor.hop_length, window=window, return_complex=True)[..., :-1]
    # Not abs() ** 2: the absolute value has no gradient in digital silence.
    power = spectrum.real.square() + spectrum.imag.square()
    filters = torch.from_numpy(extractor.mel_filters).to(waves.device, torch.float32)
    loud = (filters.T @ power).clamp(min=1e-10).log10()
    loud = torch.maximum(loud, loud.amax(dim=(1, 2), keepdim=True) - 8.0)
    return ((loud + 4.0) / 4.0)[:, :, : -(-longest // extractor.hop_length)]
