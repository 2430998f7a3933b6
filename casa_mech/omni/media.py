"""Pictures and clips in the one form that the processors take (`casa_mech.queries.media`)."""

from casa_mech.queries.media import SAMPLE_RATE, check_media, load_audio, load_image

__all__ = ["SAMPLE_RATE", "check_media", "load_audio", "load_image"]
