"""Queries: the frozen records that flow through the house (see docs/architecture.md)."""

from casa_mech.queries.query import (
    AudioPart,
    Example,
    ImagePart,
    Label,
    Part,
    Query,
    Reply,
    SafetyToken,
    TextPart,
    Turn,
)

__all__ = ["AudioPart", "Example", "ImagePart", "Label", "Part", "Query", "Reply", "SafetyToken", "TextPart", "Turn"]
