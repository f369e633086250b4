"""Rewards over HTTP: from a model in this process, or from a fleet of servers behind it (`polar serve`).

The way of a request: `middleware` (key, size, time) -> `app`, `compat_routes` (JSON of our own and of other servers) ->
`service` (which checkpoint, how much may wait) -> `batcher` (the model here) or the client (servers elsewhere).
"""

from polar.serving.checkpoint import Loading
from polar.serving.middleware import RequestLimits, parse_keys
from polar.serving.server import RewardServer, bind, create_server

__all__ = ["Loading", "RequestLimits", "RewardServer", "bind", "create_server", "parse_keys"]
