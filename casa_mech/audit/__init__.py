"""What a safety token causes: interventions on the token, and attack success split by how an attack fails."""

from casa_mech.audit.audit import audit
from casa_mech.audit.result import AuditResult

__all__ = ["AuditResult", "audit"]
