"""Sessions: samplings that are never made twice and can be gone on from anywhere. Needs `latentfast[diffusers]`.

See `Session`, and docs/sessions.md.
"""

from latentfast.session.keep import Budget
from latentfast.session.replay import Replay
from latentfast.session.session import Session
from latentfast.session.trajectory import Request, Seeds, Trajectory

__all__ = ["Budget", "Replay", "Request", "Seeds", "Session", "Trajectory"]
