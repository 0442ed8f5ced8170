"""Signatures of other code bases over fastapd: `fastapd.compat.apd` is the research code's."""
